"""TOML <-> RunConfig. An unknown key or a value of the wrong kind is one error that names the nearest legal key."""

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fastppo.checks import InputError, require
from fastppo.config import RunConfig
from fastppo.secret import redacted


def load_config(path: str | Path) -> RunConfig:
    """Read a run file: TOML, or the config.json of a run folder.

    Raises:
        ValueError: the file cannot be read, is not TOML, or does not describe a legal run.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        tables = json.loads(text) if Path(path).suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise InputError(f"cannot read the run file {str(path)!r}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        kind = "JSON" if Path(path).suffix == ".json" else "TOML"
        raise InputError(f"{path} is not valid {kind}: {error}") from error
    return from_dict(RunConfig, tables)


def from_dict(cls: type, tables: Mapping[str, Any], where: str = "") -> Any:
    """Build the frozen dataclass `cls` from nested dictionaries, strictly."""
    require(isinstance(tables, Mapping), f"{where or 'the run file'} must be a table, got {tables!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in tables:
        near = difflib.get_close_matches(key, fields, n=1, cutoff=0)
        require(key in fields, f"unknown key {_join(where, key)!r}; did you mean {_join(where, near[0])!r}?")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        require(name in tables or not required, f"missing key {_join(where, name)!r}: it has no default")
    return cls(**{key: _convert(hints[key], value, _join(where, key)) for key, value in tables.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of `from_dict`, ready for JSON and fit to be written down: URLs without their secrets."""
    return _redacted(dataclasses.asdict(config))


def _redacted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _redacted(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_redacted, value))
    return redacted(value) if isinstance(value, str) else value


def _convert(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return from_dict(kind, value, where)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType or origin is typing.Union:
        inner = [a for a in args if a is not type(None)]
        return None if value is None or value == "none" else _convert(inner[0], value, where)  # TOML has no null
    if origin is Literal:
        near = difflib.get_close_matches(str(value), [str(a) for a in args], n=1, cutoff=0.0)
        hint = f"did you mean {near[0] if near else args[0]!r}?"
        require(value in args, f"{where} must be one of {list(args)}, got {value!r}; {hint}")
        return value
    if origin is tuple:
        hint = f" (in TOML: [[{where}]])" if dataclasses.is_dataclass(args[0]) else ""
        require(isinstance(value, list | tuple), f"{where} must be a list{hint}, got {value!r}")
        item = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        require(len(item) == len(value), f"{where} must have {len(item)} entries, got {len(value)}")
        return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(item, value, strict=True)))
    return _scalar(kind, value, where)


def _scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    legal = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    require(legal, f"{where} must be of type {kind.__name__}, got {value!r}")
    return value


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
