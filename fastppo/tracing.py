"""`fastppo train --profile`: a trace of a few iterations and what each phase spends its time on.

The first iteration after the start warms up, the next two are recorded. The run folder gets `trace.json.gz`, for
chrome://tracing or Perfetto, and `profile.txt`: for each phase the ten operators with the most time of their own, on
the device where there is one.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

RECORDED = 2  # iterations
LISTED = 10  # operators of a phase
PREFIX = "phase/"


class Trace:
    """Off: does nothing."""

    def span(self, phase: str) -> AbstractContextManager[Any]:
        """Around a phase."""
        return nullcontext()

    def step(self) -> None:
        """After an iteration."""


class Profiler(Trace):
    """On: names the phases in the trace, and moves the schedule on."""

    def __init__(self, made: profile) -> None:
        self.profile = made

    def span(self, phase: str) -> AbstractContextManager[Any]:
        return record_function(PREFIX + phase)

    def step(self) -> None:
        self.profile.step()


@contextmanager
def tracing(folder: Path, remaining: int, *, on: bool) -> Iterator[Trace]:
    """Record iterations while this is open.

    Args:
        folder: where the trace goes.
        remaining: iterations of this start; with a single one, that one is recorded.
    """
    if not on:
        yield Trace()
        return
    plan = schedule(wait=0, warmup=1, active=min(RECORDED, remaining - 1), repeat=1) if remaining > 1 else None
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities, schedule=plan, on_trace_ready=lambda p: write(p, folder)) as made:
        yield Profiler(made)


def write(made: Any, folder: Path) -> None:
    """The trace, and the table."""
    made.export_chrome_trace(str(folder / "trace.json.gz"))
    (folder / "profile.txt").write_text(table(made.events()), encoding="utf-8")
    print(f"profile: {folder / 'profile.txt'}, and {folder / 'trace.json.gz'} for Perfetto", flush=True)


def table(events: Any) -> str:
    """A table for each phase, the phases in the order in which they ran."""
    phases = sorted((e for e in events if e.name.startswith(PREFIX)), key=lambda e: e.time_range.start)
    on_device = any(_device_us(e) > 0 for e in events)
    spent: Callable[[Any], float] = _device_us if on_device else lambda e: e.self_cpu_time_total
    totals: dict[str, dict[str, list[float]]] = {e.name: defaultdict(lambda: [0.0, 0]) for e in phases}
    for event in events:
        phase = next((p for p in phases if _within(event, p)), None)
        if phase is not None and not event.name.startswith(PREFIX):
            entry = totals[phase.name][event.name]
            entry[0] += spent(event) / 1e3
            entry[1] += 1
    where = "device" if on_device else "CPU"
    return "\n".join(_table(name, found, where) for name, found in totals.items())


def _table(name: str, found: dict[str, list[float]], where: str) -> str:
    total = sum(ms for ms, _ in found.values()) or 1.0
    lines = [f"{name.removeprefix(PREFIX)}: {total:.3f} ms of {where} time in operators"]
    lines.append(f"{'ms':>12}{'share':>8}{'calls':>8}")
    for op, (ms, calls) in sorted(found.items(), key=lambda item: -item[1][0])[:LISTED]:
        lines.append(f"{ms:12.3f}{ms / total:8.1%}{calls:8.0f}  {op}")
    return "\n".join(lines) + "\n"


def _within(event: Any, phase: Any) -> bool:
    """By when it began: what a backward thread runs has no parent in the phase."""
    return phase.time_range.start <= event.time_range.start <= phase.time_range.end


def _device_us(event: Any) -> float:
    return float(getattr(event, "self_device_time_total", 0.0))
