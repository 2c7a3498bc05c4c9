"""Times variants of one op against each other: outputs checked first, then in turn, in one process.

A variant that does not match float64 is not timed. Rounds run every variant once, in order, so a slow minute of the
machine meets all of them, and a yardstick that no commit changes; caches are overwritten before each call. Ratios are
taken round by round, and their median is what to quote. On a GPU what is short is timed once more as a CUDA graph. The
least bytes and operations of an op are written out by its module in `ops`; `records` makes shares of the copy and
matmul rates of this machine of them.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastppo.bench import records
from fastppo.bench.machine import cache_flush, captured, machine, seconds_per_call, yardstick
from fastppo.bench.ppo_iteration.peak_memory import PeakMemory, resident_bytes
from fastppo.bench.records import OURS, Record, Work

Outputs = Mapping[str, Tensor]
YARDSTICK = "yardstick"
GRAPH_ROUNDS, GRAPH_BELOW = 15, 5e-3  # seconds: of longer calls, launches are no part
LEAST_ROUNDS = 5  # fewer say nothing about the noise
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
    graph: bool = True
    """Whether, on a GPU, it is timed as a CUDA graph too: not what runs threads or waits for the device."""
    num_bytes: float | None = None
    """Replaces the least bytes of the case for a variant that keeps its tensors in another precision."""
    dtype: torch.dtype | None = None
    """Replaces that of the case for a variant that multiplies in another precision."""


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
    tokens: float = 0.0
    """That the op works through; 0: not counted in tokens."""
    facts: Record = field(default_factory=dict)
    """Of this commit, to be read beside the numbers; not part of what is measured, which `setting` says."""
    suite: str = "kernels"

    def work(self, variant: Variant) -> Work:
        """The least that must be done, for a floor."""
        num_bytes = self.num_bytes if variant.num_bytes is None else variant.num_bytes
        return Work(num_bytes, self.flops, variant.dtype or self.dtype, self.tokens)


def peer(module: str, make: Callable[[Any], Variant]) -> Variant | str:
    """The variant that `make` makes of the module of a peer, or the reason why there is none."""
    try:
        return make(importlib.import_module(module))
    except Exception as error:  # a peer that fails in any way at import is absent
        return f"{module}: {_reason(error)}"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def measure(case: Case, options: argparse.Namespace) -> list[Record]:
    """Check, time and print the variants of a case; one record per variant, appended to options.out.

    Raises:
        ValueError: fastppo's own outputs are wrong; nothing was timed.
    """
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
    times = _rounds(variants, options)
    lines = [
        {**head(case), "variant": name, "note": v.note}
        | records.numbers(times[name].wall, case.work(v), options.device)
        | records.shortened(
            {
                "cpu_ms": 1e3 * statistics.median(times[name].cpu),
                "times_fastppo": _times_ours(times[name], times[OURS]),
                "error": errors[name],
                "peak_extra_mb": memory[name] / 2**20,
            }
        )
        | {records.YARDSTICK: [records.short(1e3 * x) for x in times[YARDSTICK].wall]}
        | _graph(v, statistics.median(times[name].wall), options.device)
        for name, v in variants.items()
    ]
    lines += [{**head(case), "variant": name, "skipped": why} for name, why in skipped.items()]
    least = f"least: {case.num_bytes / 1e9:.3g} GB, {case.flops / 1e9:.4g} GFLOP"
    records.show(f"{case.op}  {records.setting_text(case.setting)}  {least}", lines)
    here = machine(options.device, options.seed, options.commit)
    records.append(options.out, [line | {"machine": here} for line in lines])
    return lines


def _times_ours(times: _Times, ours: _Times) -> float:
    return statistics.median(a / b for a, b in zip(times.wall, ours.wall, strict=True))


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Largest |actual - truth| over the largest |truth|; infinite for another shape, NaN for a NaN.

    A number is compared with 1 if it is smaller (a loss near 0 is a sum that cancelled), and so is what is all zeros.
    """
    if actual.shape != truth.shape:
        return math.inf
    scale, error = truth.abs().max().item(), (actual.detach().double() - truth).abs().max().item()
    return error / (max(scale, 1.0) if truth.ndim == 0 or scale == 0 else scale)


def check(variant: Variant, case: Case, leeway: float = 1.0) -> float:
    """The largest relative error of the outputs; NaN where there is no truth to compare with.

    Raises:
        ValueError: it exceeds the case's tolerance times `leeway`, or is NaN.
    """
    error, allowed = _error(variant, case), case.tolerance * leeway
    if not error <= allowed and _truth(variant, case):
        raise ValueError(f"error {error:.1e} of {case.op} {case.setting} exceeds {allowed:.0e}")
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
    outputs, truth = variant.run(), _truth(variant, case)
    if not truth:
        return math.nan
    picked = (variant.pick or case.pick)(outputs)
    worst = [relative_error(picked[name], expected) for name, expected in truth.items()]
    return math.nan if any(map(math.isnan, worst)) else max(worst)


def _truth(variant: Variant, case: Case) -> Outputs:
    """What its outputs are compared with; empty: nothing."""
    return case.truth if variant.truth is None else variant.truth


@dataclass
class _Times:
    wall: list[float] = field(default_factory=list)  # seconds per call
    cpu: list[float] = field(default_factory=list)  # user and system time of all threads


def _rounds(variants: dict[str, Variant], options: argparse.Namespace) -> dict[str, _Times]:
    """Seconds of every variant and of the yardstick, one entry per round."""
    flush, stick = cache_flush(options.device), yardstick(options.device)
    timed = {**variants, YARDSTICK: Variant(run=stick)}
    times = {name: _Times() for name in timed}
    calls = {name: _calls(v, options.device) for name, v in timed.items()}
    end = time.perf_counter() + options.seconds
    for round_ in range(options.repeats):
        if round_ >= LEAST_ROUNDS and time.perf_counter() > end:
            break
        for name, variant in timed.items():
            wall, cpu = _time(variant, calls[name], options.device, flush)
            times[name].wall.append(wall)
            times[name].cpu.append(cpu)
    return times


def _calls(variant: Variant, device: str) -> int:
    """Calls per round, so that a round of a short variant lasts two milliseconds or ten calls; a warm-up too."""
    seconds = _time(variant, 1, device, lambda: None)[0]
    if seconds < 0.02:  # the first, of what is short, warms up
        seconds = min(_time(variant, 1, device, lambda: None)[0] for _ in range(2))
    return max(1, min(10, math.ceil(2e-3 / max(seconds, 1e-6))))


def _time(variant: Variant, calls: int, device: str, flush: Callable[[], Any]) -> tuple[float, float]:
    """(wall, CPU) seconds per call, the caches overwritten after what comes before it."""

    def before() -> None:
        if variant.before:
            variant.before()
        flush()

    return seconds_per_call(variant.run, calls, device, before)


def _graph(variant: Variant, seconds: float, device: str) -> Record:
    """On a GPU, the time of the kernels alone: the call captured in a CUDA graph, or why it cannot be.

    Between two events an eager call of a few short kernels takes as long as Python needs to launch them.
    """
    if device == "cpu" or not variant.graph or seconds > GRAPH_BELOW:
        return {}
    if variant.before:
        variant.before()
    try:
        replay, flush = captured(variant.run), cache_flush(device)
        again = Variant(run=lambda: replay() or {}, before=variant.before)
        calls = _calls(again, device)
        times = [_time(again, calls, device, flush)[0] for _ in range(GRAPH_ROUNDS)]
    except Exception as error:  # of a peer as of the op: whatever waits for the device fails in its own way
        torch.cuda.synchronize()
        return {"no_graph": _reason(error)}
    return {"graph_ms": records.short(1e3 * statistics.median(times))}


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


def head(case: Case) -> Record:
    return {"suite": case.suite, "op": case.op, "setting": case.setting, **case.facts}
