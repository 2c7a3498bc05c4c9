"""What PyTorch's CPU allocator handed out: live bytes and their peak in named phases of a block.

Its own report of every allocation and release, buffers inside native operators included; what libraries take past it
(oneDNN's scratch, the interpreter) is not in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile, record_function

PREFIX = "phase: "


@dataclass(frozen=True)
class Use:
    """Bytes, counted from the beginning of the profile."""

    before: int
    peak: int
    after: int


class MemoryProfile:
    """Context manager; `phases` has what was used by each `phase`, once it is closed."""

    def __init__(self) -> None:
        self.phases: dict[str, Use] = {}
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens within is `name`; of one that happens several times the largest peak counts."""
        with record_function(PREFIX + name):
            yield

    def __enter__(self) -> MemoryProfile:
        self._profile.__enter__()
        torch.empty(1)
        return self

    def __exit__(self, *error: object) -> None:
        self._profile.__exit__(*error)  # pyright: ignore[reportArgumentType]
        events = sorted(self._profile.profiler.kineto_results.events(), key=lambda e: e.start_ns())  # pyright: ignore
        steps = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]  # pyright: ignore
        spans = [e for e in events if e.name().startswith(PREFIX)]
        for span in spans:
            use = _use(steps, span.start_ns(), span.start_ns() + span.duration_ns())
            name = span.name().removeprefix(PREFIX)
            if name not in self.phases or use.peak > self.phases[name].peak:
                self.phases[name] = use


def _use(steps: list[tuple[int, int]], start: int, end: int) -> Use:
    before = live = sum(size for when, size in steps if when < start)
    peak = before
    for size in (size for when, size in steps if start <= when <= end):
        live += size
        peak = max(peak, live)
    return Use(before, peak, live)
