"""Exclusive seconds and peak memory of the phases of an iteration, nested ones apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastppo.bench.ppo_iteration.peak_memory import PeakMemory, resident_bytes


class Clock:
    """`with clock("update"):` counts towards that phase, unless a phase inside it does.

    Args:
        device: on a GPU the clock waits for it wherever a phase begins or ends.
        memory: keep the highest memory of each phase too; on a CPU that is sampled, which disturbs times.
    """

    def __init__(self, device: str, *, memory: bool = False) -> None:
        self.device, self.memory = device, memory
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0
        self._sampler = PeakMemory(5e-3) if memory and device == "cpu" else None

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._cut()
        self._open.append(phase)
        try:
            yield
        finally:
            self._cut()
            self._open.pop()

    @contextmanager
    def sampling(self) -> Iterator[Clock]:
        """Memory is watched while this is open."""
        if self._sampler is None:
            yield self
        else:
            with self._sampler:
                yield self

    def around(self, owner: Any, name: str, phase: Callable[..., str]) -> None:
        """Stand in front of a method: its calls count towards the phase that `phase` makes of their arguments."""
        method = getattr(owner, name)

        def timed(*args: Any) -> Any:
            with self(phase(*args)):
                return method(*args)

        setattr(owner, name, timed)

    def _cut(self) -> None:
        """The span since the last cut belongs to the innermost open phase."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._open:
            phase = self._open[-1]
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
            if self.memory:
                self.peak_bytes[phase] = max(self.peak_bytes.get(phase, 0.0), self._peak())
        if self.memory:
            self._reset()
        self._since = time.perf_counter()

    def _peak(self) -> float:
        return float(
            max(self._sampler.peak_bytes, resident_bytes()) if self._sampler else torch.cuda.max_memory_allocated()
        )

    def _reset(self) -> None:
        if self._sampler:
            self._sampler.peak_bytes = resident_bytes()
        else:
            torch.cuda.reset_peak_memory_stats()
