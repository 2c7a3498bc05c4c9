"""Ctrl-C and SIGTERM, of a scheduler or torchrun, end a run between two iterations; a second one ends it at once."""

import os
import signal
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

ONE_REQUEST = 2.0  # seconds within which signals are one: make, timeout and torchrun pass on what the group got itself
MESSAGE = b"\nstopping when this iteration is done; once more to stop now\n"


def stop(signals: Collection[int]) -> None:
    """End the process as it was asked to, if it was: with 0 after SIGTERM, as after Ctrl-C else."""
    if signal.SIGTERM in signals:
        raise SystemExit(0)
    if signals:
        raise KeyboardInterrupt


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Yields a list that the number of a SIGINT or SIGTERM is put into; a later one raises KeyboardInterrupt.

    A signal that was ignored stays ignored. Outside the main thread, where Python takes no handlers, none is changed.
    """
    received: list[int] = []
    first = 0.0

    def receive(number: int, _: FrameType | None) -> None:
        nonlocal first
        if received and time.monotonic() - first > ONE_REQUEST:
            raise KeyboardInterrupt
        received.append(number)
        if len(received) == 1:
            first = time.monotonic()
            with suppress(OSError):  # Ctrl-C may have ended who reads this
                os.write(1, MESSAGE)  # print may be in the middle of a line

    taken = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():
        taken = []
    before = {number: signal.signal(number, receive) for number in taken}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
