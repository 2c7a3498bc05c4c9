"""Lines about a fault that lasts: the first at once, the next ones at doubling intervals."""

import time

FIRST_S = 10.0  # from the first line of a kind to the second


class Rarely:
    """Prints lines; of those of one kind fewer and fewer. What is held back is counted in the next one."""

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[float, float, int]] = {}  # when one is due, the interval after it, how many wait

    def __call__(self, kind: str, line: str) -> None:
        now = time.monotonic()
        due, interval, held = self._kinds.get(kind, (now, FIRST_S, 0))
        if now < due:
            self._kinds[kind] = due, interval, held + 1
            return
        self._kinds[kind] = now + interval, 2 * interval, 0
        print(line + (f" (and {held} times since this was last said)" if held else ""), flush=True)

    def anew(self, *kinds: str) -> None:
        """The fault has passed: the next line of these kinds is a first one."""
        for kind in kinds:
            self._kinds.pop(kind, None)
