"""Checkpoint folders that are whole or not there: written aside, synced, checksummed, renamed. No pickle.

policy/ critic/      plain Hugging Face folders, for everybody
state.safetensors    float32 weights and optimizer moments of what trains, by role and parameter name
state.json           the small state at an iteration's end: counters, controllers, running statistics, positions, RNG
checksums.json       SHA-256 of every other file, written last
"""

import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastppo import distributed
from fastppo.checks import InputError, require
from fastppo.durable import sync

CHECKSUMS, NUMBERS, TENSORS = "checksums.json", "state.json", "state.safetensors"
FORMAT = 2
ABANDONED, PARTIAL, OLD = "abandoned-", ".partial", ".old"


class CheckpointError(OSError):
    """A checkpoint cannot be written; what was there before is untouched."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk, its checksums verified."""

    path: Path
    numbers: dict[str, Any]  # state.json

    @property
    def step(self) -> int:
        """PPO iterations done."""
        return self.numbers["step"]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of state.safetensors one at a time, in host memory, a parameter's side by side."""
        require(
            (self.path / TENSORS).is_file(),
            f"rank {distributed.rank()} finds no {self.path / TENSORS}: every rank reads it",
        )
        with safe_open(self.path / TENSORS, "pt") as file:
            for name in sorted(file.keys(), key=lambda name: name.split("/")):
                yield name, file.get_tensor(name)


def write(
    folder: Path, save_models: Callable[[Path], None], numbers: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]
) -> None:
    """Write `folder`; what had its name is removed only after the new one is whole.

    Args:
        save_models: writes the plain model folders into the path it is given.
        numbers: JSON; None: no state is known from which a run could go on, only the models are written.

    Raises:
        CheckpointError: the disk is full or cannot be written. What was there before is untouched.
    """
    partial = folder.with_name(f".{folder.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_models(partial)
        if numbers is not None:
            save_file({name: x.detach().contiguous() for name, x in tensors.items()}, partial / TENSORS)
            (partial / NUMBERS).write_text(json.dumps({"format": FORMAT, **numbers}), encoding="utf-8")
        sums = {str(path.relative_to(partial)): _sha256(path) for path in _files(partial)}
        (partial / CHECKSUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")
        for path in [*_files(partial), *(p for p in partial.rglob("*") if p.is_dir()), partial]:
            sync(path)
        _replace(partial, folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError) or type(error) is Exception:  # the last: of a tokenizer
            why = f"{error}: those written before are as they were; make room and go on with --resume"
            raise CheckpointError(f"cannot write the checkpoint {folder}: {why}") from error
        raise


def read(folder: Path) -> Checkpoint:
    """Open a checkpoint that a run can go on from.

    Raises:
        ValueError: it is damaged, incomplete, or holds models only.
    """
    inside = sorted(path.name for path in _candidates(folder / "checkpoints"))
    require(not inside, f"{folder} is a run folder: give one of its checkpoints/, {', '.join(inside)}")
    try:
        sums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        missing = [name for name in sums if not (folder / name).is_file()]
        require(not missing, f"checkpoint {folder}: {', '.join(missing)} is missing")
        damaged = [name for name, sha256 in sums.items() if _sha256(folder / name) != sha256]
        require(not damaged, f"checkpoint {folder}: {', '.join(damaged)} is damaged (its checksum differs)")
        require(NUMBERS in sums and TENSORS in sums, f"checkpoint {folder} holds models only, no state to go on from")
        numbers = json.loads((folder / NUMBERS).read_text(encoding="utf-8"))
        known = numbers["format"] == FORMAT
        require(known, f"checkpoint {folder} has format {numbers['format']}, this version reads {FORMAT}")
    except OSError as error:
        raise InputError(f"checkpoint {folder}: cannot read {error.filename}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"checkpoint {folder}: {CHECKSUMS} or {NUMBERS} is damaged ({error})") from error
    return Checkpoint(folder, numbers)


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The whole checkpoint of most iterations under `folder`, and why others that claim more were passed over."""
    passed_over: list[str] = []
    for path in by_steps(folder):
        try:
            return read(path), passed_over
        except InputError as error:
            passed_over.append(str(error))
    return None, passed_over


def by_steps(folder: Path) -> list[Path]:
    """What may be checkpoints of this run, those that claim the most iterations first; nothing half written, and
    nothing of a future that was abandoned."""
    return sorted(_candidates(folder), key=claimed_step, reverse=True)


def repair(folder: Path) -> None:
    """Finish what killed processes were at: delete what was half written, and give back its name to a checkpoint that
    was making place for a new one."""
    for path in folder.glob(f".*{PARTIAL}"):
        shutil.rmtree(path)
    for old in folder.glob(f".*{OLD}"):
        path = old.with_name(old.name[1 : -len(OLD)])
        if path.exists():
            shutil.rmtree(old)
        else:
            old.rename(path)


def set_aside(folder: Path, step: int) -> None:
    """Rename checkpoints of more than `step` iterations: the run goes on from there, and they are of another future."""
    for path in _candidates(folder):
        if claimed_step(path)[0] > step:
            path.rename(folder / f"{ABANDONED}{path.name.lstrip('.')}-{time.time_ns()}")


def prune(folder: Path, keep_last: int) -> None:
    """Delete all but the last `keep_last` of `step-*`; 0 keeps all. Other names are never touched.

    What cannot be deleted, as where somebody reads it on NFS, is said: it ends no run.
    """
    steps = sorted((path for path in folder.glob("step-*") if path.is_dir()), key=claimed_step)
    for path in steps[: -keep_last or len(steps)] if keep_last else []:
        try:
            shutil.rmtree(path)
        except OSError as error:
            print(f"cannot delete the checkpoint {path}: {error}", flush=True)


def rng_state() -> dict[str, Any]:
    """The global random number generators of this process, as JSON: Python, NumPy, torch on CPU and CUDA."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": pack(torch.get_rng_state()),
        "cuda": [pack(x.cpu()) for x in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Back to what `rng_state` returned; on another number of GPUs only the CPU's."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(unpack(state["torch"]))
    if torch.cuda.is_available() and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all([unpack(x) for x in state["cuda"]])


def pack(state: Tensor) -> str:
    """A generator's state, (n,) uint8, as text."""
    return state.numpy().tobytes().hex()


def unpack(text: str) -> Tensor:
    """The inverse of `pack`."""
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _candidates(folder: Path) -> list[Path]:
    """Every folder but the half-written; a killed rename leaves the whole `.<name>.old`."""
    folders = [p for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
    return [p for p in folders if not p.name.endswith(PARTIAL) and not p.name.startswith(ABANDONED)]


def claimed_step(folder: Path) -> tuple[int, str]:
    """To sort by: the step of state.json, or of the folder's name where that cannot be read; models alone come last."""
    try:
        return int(json.loads((folder / NUMBERS).read_text(encoding="utf-8"))["step"]), folder.name
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        digits = folder.name.removeprefix("step-")
        return int(digits) if digits.isdecimal() else -1, folder.name


def _replace(partial: Path, folder: Path) -> None:
    """At every moment one of the two is there and whole, under its name or as `.<name>.old`."""
    old = folder.with_name(f".{folder.name}{OLD}")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        partial.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    for above in folder.parents[:3]:  # this run may have made them
        if os.access(above, os.R_OK):
            sync(above)
    shutil.rmtree(old, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
