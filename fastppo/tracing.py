"""`fastppo train --profile`: a trace of a few iterations and what each phase spends its time on.

The first iteration after the start warms up, the next two are recorded. The run folder gets `trace.json.gz`, for
chrome://tracing or Perfetto, and `profile.txt`: for each phase the ten operators with the most time of their own, on
the device where there is one. What runs there without an operator, as a replayed CUDA graph does, is listed by kernel.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.profiler import ProfilerActivity, profile, record_function, schedule

RECORDED = 2  # iterations
LISTED = 10  # operators of a phase
PREFIX = "phase/"
CALL = re.compile("(cuda|cu|hip)[A-Z]")  # the driver's functions, such as cudaLaunchKernel


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
    host = [e for e in events if e.device_type == DeviceType.CPU]  # the device repeats the phases, when it gets to them
    phases = sorted((e for e in host if e.name.startswith(PREFIX)), key=lambda e: e.time_range.start)
    on_device = any(e.self_device_time_total > 0 for e in events)
    spent = _on_device(events) if on_device else [(e, e.name, e.self_cpu_time_total) for e in host]
    totals: dict[str, dict[str, list[float]]] = {e.name: defaultdict(lambda: [0.0, 0]) for e in phases}
    for event, listed_as, us in spent:
        phase = next((p for p in phases if _within(event, p)), None)
        if phase is not None and not event.name.startswith(PREFIX):
            entry = totals[phase.name][listed_as]
            entry[0] += us / 1e3
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


def _on_device(events: Any) -> Iterator[tuple[Any, str, float]]:
    """What the host did, what to list it as, and the microseconds of the kernels it launched.

    A kernel counts once and by its launch, as it may run when the host is a phase further on.
    """
    found = [e for e in events if not e.is_user_annotation]  # their kernels count already
    host = [e for e in found if e.device_type == DeviceType.CPU]
    calls = {e.id: e for e in host if CALL.match(e.name)}
    # a call's own time is left out: torch gives it the kernels of the operator with the same number
    yield from ((e, e.name, e.self_device_time_total) for e in host if not CALL.match(e.name))
    for kernel in (e for e in found if e.device_type != DeviceType.CPU):
        call = calls.get(kernel.id)
        if call is not None and not _by_operator(kernel, call):
            yield call, kernel.name, kernel.self_device_time_total


def _by_operator(kernel: Any, call: Any) -> bool:
    """Whether an operator launched it, whose time then has it."""
    if (operator := getattr(kernel, "linked_correlation_id", None)) is not None:
        return operator > 0
    parent = call.cpu_parent  # torch 2.11 does not say
    while parent is not None and (parent.is_user_annotation or CALL.match(parent.name)):
        parent = parent.cpu_parent
    return parent is not None
