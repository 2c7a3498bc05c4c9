"""Times variants of one op against each other: outputs checked first, then in turn, in one process.

A variant that does not match float64 is not timed. Rounds run every variant once, in order, so a slow minute of the
machine meets all of them; ratios are taken round by round, and their median is what to quote. On a GPU every variant is
timed once more as a CUDA graph. The least bytes and operations of an op are written out by its script; here they become
shares of the copy and matmul rates of this machine.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from machine import captured, copy_rate, machine, matmul_rate, seconds_per_call
from peak_memory import PeakMemory, resident_bytes
from torch import Tensor

Outputs = Mapping[str, Tensor]
OURS = "fastppo"
GRAPH_ROUNDS = 15
PEERS_LEEWAY = 20.0  # some work in bfloat16 throughout; the error stands beside the time


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run an op."""

    run: Callable[[], Outputs]
    """The timed call; its outputs are compared with the truth."""
    before: Callable[[], object] | None = None
    """Runs before every call, untimed: restores inputs that a call overwrites."""
    truth: Outputs | None = None
    """Replaces that of the case for a variant with another objective; {} for one that has no result."""
    pick: Callable[[Outputs], Outputs] | None = None
    """Replaces that of the case for outputs laid out otherwise."""
    note: str = ""
    """What to know when comparing."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op at one shape."""

    op: str
    setting: dict[str, Any]
    variants: dict[str, Variant | str]
    """By name; a string is the reason why that one is left out."""
    truth: Outputs
    """float64."""
    tolerance: float
    """Largest |output - truth| allowed, relative to the largest |truth|."""
    pick: Callable[[Outputs], Outputs] = field(default=lambda outputs: outputs)
    """The part of the outputs that `truth` has."""
    num_bytes: float
    """Least bytes that must be read and written."""
    flops: float = 0.0
    """Least floating-point operations of the matrix products."""
    dtype: torch.dtype = torch.float32
    """Of the products' operands: which matmul rate to compare with."""


def parser(doc: str | None, *, repeats: int = 15) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"))
    made.add_argument("--entropy", type=boolean, nargs="+", default=[False, True], help="of the row losses")
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--repeats", type=int, default=repeats, help="rounds per case, unless --seconds ends them first")
    made.add_argument("--seconds", type=float, default=20.0, help="of rounds per case, after at least 3")
    made.add_argument("--only", nargs="+", help="names of variants; fastppo always runs")
    made.add_argument("--quick", action="store_true", help="tiny shapes: does it run?")
    made.add_argument("--out", type=Path, help="append JSON lines here")
    return made


def boolean(text: str) -> bool:
    """ "True" or "False"."""
    return {"True": True, "False": False}[text]


def sizes(text: str) -> tuple[int, ...]:
    """ "1024,128,32000" as numbers."""
    return tuple(int(number) for number in text.split(","))


def start(made: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """The parsed options, with the number of threads set."""
    options = made.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    return options


def run(made: argparse.ArgumentParser, cases: Callable[[argparse.Namespace], Iterable[Case]]) -> None:
    """A whole script: every case of the options on the command line."""
    options = start(made)
    for case in cases(options):
        compare(case, options)


def peer(module: str, make: Callable[[Any], Variant]) -> Variant | str:
    """The variant that `make` makes of the module of a peer, or the reason why there is none."""
    try:
        return make(importlib.import_module(module))
    except Exception as error:  # a peer that fails in any way at import is absent
        return f"{module}: {_reason(error)}"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def compare(case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Check, time and print the variants of a case; one JSON object per variant, appended to options.out."""
    torch.compiler.reset()
    chosen = {n: v for n, v in case.variants.items() if not options.only or n in (OURS, *options.only)}
    skipped = {name: v for name, v in chosen.items() if isinstance(v, str)}
    variants, errors = {name: v for name, v in chosen.items() if isinstance(v, Variant)}, {}
    for name in list(variants):
        found = _checked(variants[name], case, must=name == OURS)
        if isinstance(found, str):
            skipped[name] = found
            del variants[name]
        else:
            errors[name] = found
        _free()
    memory = {name: _peak_extra_bytes(v, options.device) for name, v in variants.items()}
    rounds = _rounds(variants, options)
    lines = [
        {**_head(case), "variant": name, "note": v.note}
        | _numbers(case, rounds[name], rounds[OURS], options.device)
        | {"error": _short(errors[name]), "peak_extra_mb": _short(memory[name] / 2**20)}
        | _graph(v, options.device)
        for name, v in variants.items()
    ]
    _print(case, lines, skipped)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a", encoding="utf-8") as file:
            for line in [*lines, *({**_head(case), "variant": n, "skipped": why} for n, why in skipped.items())]:
                file.write(json.dumps(line | {"machine": machine(options.device)}) + "\n")
    return lines


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Largest |actual - truth| over the largest |truth|; infinite for another shape, NaN for a NaN.

    A number is compared with 1 if it is smaller (a loss near 0 is a sum that cancelled), and so is what is all zeros.
    """
    if actual.shape != truth.shape:
        return math.inf
    scale, error = truth.abs().max().item(), (actual.detach().double() - truth).abs().max().item()
    return error / (max(scale, 1.0) if truth.ndim == 0 or scale == 0 else scale)


def check(variant: Variant, case: Case, leeway: float = 1.0) -> float:
    """The largest relative error of the outputs.

    Raises:
        ValueError: it exceeds the case's tolerance times `leeway`, or is NaN.
    """
    error, allowed = _error(variant, case), case.tolerance * leeway
    if not error <= allowed:
        raise ValueError(f"not timed: error {error:.1e} of {case.op} {case.setting} exceeds {allowed:.0e}")
    return error


def _checked(variant: Variant, case: Case, *, must: bool) -> float | str:
    """The largest relative error of the outputs, or why the variant is not timed; an exception if it `must` be."""
    try:
        return check(variant, case, 1.0 if must else PEERS_LEEWAY)
    except Exception as exception:  # a peer may fail in any way
        if must:
            raise
        return _reason(exception)


def _error(variant: Variant, case: Case) -> float:
    if variant.before:
        variant.before()
    outputs, truth = variant.run(), case.truth if variant.truth is None else variant.truth
    if not truth:
        return 0.0
    picked = (variant.pick or case.pick)(outputs)
    worst = [relative_error(picked[name], expected) for name, expected in truth.items()]
    return math.nan if any(map(math.isnan, worst)) else max(worst)


@dataclass
class _Times:
    wall: list[float] = field(default_factory=list)  # seconds per call
    cpu: list[float] = field(default_factory=list)  # user and system time of all threads


def _rounds(variants: dict[str, Variant], options: argparse.Namespace) -> dict[str, _Times]:
    """Seconds of every variant, one entry per round."""
    times = {name: _Times() for name in variants}
    calls = {name: _calls(v, options.device) for name, v in variants.items()}
    end = time.perf_counter() + options.seconds
    for round_ in range(options.repeats):
        if round_ >= 3 and time.perf_counter() > end:
            break
        for name, variant in variants.items():
            wall, cpu = _time(variant, calls[name], options.device)
            times[name].wall.append(wall)
            times[name].cpu.append(cpu)
    return times


def _calls(variant: Variant, device: str) -> int:
    """Calls per round, so that a round of a short variant lasts a few milliseconds; a warm-up too."""
    if variant.before:
        _time(variant, 1, device)
        return 1
    seconds = _time(variant, 1, device)[0]
    return max(1, min(200, math.ceil(5e-3 / max(seconds, 1e-6))))


def _time(variant: Variant, calls: int, device: str) -> tuple[float, float]:
    """(wall, CPU) seconds per call."""
    if variant.before:
        variant.before()
    return seconds_per_call(variant.run, calls, device)


def _graph(variant: Variant, device: str) -> dict[str, Any]:
    """On a GPU, the time of the kernels alone: the call captured in a CUDA graph, or why it cannot be.

    Between two events an eager call of a few short kernels takes as long as Python needs to launch them.
    """
    if device == "cpu":
        return {}
    if variant.before:
        variant.before()
    try:
        replay = captured(variant.run)
        calls = _calls(Variant(run=lambda: replay() or {}), device)
        times = [seconds_per_call(replay, calls, device)[0] for _ in range(GRAPH_ROUNDS)]
    except Exception as error:  # of a peer as of the op: whatever waits for the device fails in its own way
        torch.cuda.synchronize()
        return {"no_graph": _reason(error)}
    return {"graph_ms": _short(1e3 * statistics.median(times))}


def _peak_extra_bytes(variant: Variant, device: str) -> float:
    """Highest memory during a call, its results included, above that before it.

    On the CPU by sampling the resident size: buffers of a few MB, which the allocator keeps, may be missed.
    """
    if variant.before:
        variant.before()
    _free()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        variant.run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    before = resident_bytes()
    with PeakMemory(1e-3) as memory:
        outputs = variant.run()
    del outputs
    return max(0, memory.peak_bytes - before)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _head(case: Case) -> dict[str, Any]:
    return {"op": case.op, **case.setting}


def _numbers(case: Case, times: _Times, ours: _Times, device: str) -> dict[str, Any]:
    """The record of one variant's times."""
    median, fifths = statistics.median(times.wall), statistics.quantiles(times.wall, n=5, method="inclusive")
    numbers = {
        "median_ms": 1e3 * median,
        "p20_ms": 1e3 * fifths[0],
        "p80_ms": 1e3 * fifths[-1],
        "min_ms": 1e3 * min(times.wall),
        "cpu_ms": 1e3 * statistics.median(times.cpu),
        "times_fastppo": statistics.median(a / b for a, b in zip(times.wall, ours.wall, strict=True)),
        "rounds": len(times.wall),
        "least_bytes": case.num_bytes,
        "gb_per_s": case.num_bytes / median / 1e9,
        "of_copy": case.num_bytes / median / copy_rate(device),
    }
    if case.flops:
        rate = case.flops / median
        numbers |= {"least_flops": case.flops, "gflop_per_s": rate / 1e9}
        numbers["of_matmul"] = rate / matmul_rate(device, case.dtype)
    return {name: _short(x) for name, x in numbers.items() if x == x}  # not NaN


def _short(x: Any) -> Any:
    return float(f"{x:.4g}") if isinstance(x, float) else x


def _print(case: Case, lines: list[dict[str, Any]], skipped: dict[str, str]) -> None:
    setting = " ".join(f"{k}={v}" for k, v in case.setting.items())
    print(f"\n{case.op}  {setting}  least: {case.num_bytes / 1e9:.3g} GB, {case.flops / 1e9:.4g} GFLOP")
    print(f"  {'variant':26}{'median ms':>10}{'p20':>9}{'p80':>9}{'min':>9}{'CPU ms':>9}{'x fastppo':>10}", end="")
    print(f"{'of copy':>9}{'of matmul':>10}{'graph ms':>10}{'extra MB':>10}{'error':>9}")
    for line in lines:
        cells = [line.get(key, math.nan) for key in ("median_ms", "p20_ms", "p80_ms", "min_ms", "cpu_ms")]
        print(f"  {line['variant']:26}{cells[0]:10.4g}" + "".join(f"{x:9.4g}" for x in cells[1:]), end="")
        print(f"{line['times_fastppo']:10.2f}{line['of_copy']:9.1%}{line.get('of_matmul', math.nan):10.1%}", end="")
        print(
            f"{line.get('graph_ms', math.nan):10.4g}{line['peak_extra_mb']:10.1f}{line['error']:9.1e}  {line['note']}"
        )
    for name, why in skipped.items():
        print(f"  {name:26}skipped: {why}")
