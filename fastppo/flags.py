"""An option that a command does not have: one line that names the nearest one it has."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastppo.checks import InputError
from fastppo.config import RunConfig
from fastppo.run_file import to_dict


def refuse_unknown(given: Sequence[str], config: RunConfig, others: Sequence[str], command: str) -> None:
    """
    Args:
        given: arguments that belong to no option, in their order.
        others: options of the command that are not keys of the run, without their dashes.

    Raises:
        ValueError: there are such arguments.
    """
    if not given:
        return
    wrong = next((arg for arg in given if arg.startswith("-")), given[0]).partition("=")[0]
    kind = "option" if wrong.startswith("-") else "argument"
    near = difflib.get_close_matches(wrong.strip("-").replace("_", "-"), [*others, *_flags(to_dict(config))], n=1)
    found = bool(near) and kind == "option"
    hint = f"did you mean --{near[0]}?" if found else f"`fastppo {command} RUN.toml --help` lists all options"
    raise InputError(f"unknown {kind} {wrong}; {hint}")


def _flags(tables: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """Every key as an option spells it: dotted, tables of a list by number; what is true or false has two."""
    for key, value in tables.items():
        name = key.replace("_", "-")
        if isinstance(value, dict):
            yield from _flags(value, f"{where}{name}.")
        elif isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
            yield from _flags({str(i): item for i, item in enumerate(value)}, f"{where}{name}.")
        else:
            yield f"{where}{name}"
            if isinstance(value, bool):
                yield f"{where}no-{name}"
