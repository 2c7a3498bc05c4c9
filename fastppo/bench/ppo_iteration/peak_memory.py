"""Resident memory of this process, sampled in the background; standard library only."""

from __future__ import annotations

import os
import threading
from types import TracebackType

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """Resident set size right now (Linux)."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * _PAGE_BYTES


class PeakMemory:
    """Context manager that keeps the highest resident size seen while it is open.

    Sampling, rather than `ru_maxrss`, because the latter also covers a peak from before the block.
    """

    def __init__(self, interval_seconds: float = 0.02) -> None:
        self.peak_bytes = 0
        self._interval = interval_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, resident_bytes())
            if self._stop.wait(self._interval):
                return

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
