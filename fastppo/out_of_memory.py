"""Out of memory at run time: the same work again in portions of half the size, until the smallest does not fit.

Portions decide how much is in memory at a time and nothing else, so what is redone gives the same numbers but for
rounding. Nothing here runs while memory suffices.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

T = TypeVar("T")
SIGNS = (  # what a RuntimeError says that is an allocation which failed
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA out of memory",
    "CUDA error: out of memory",
)


class OutOfMemory(RuntimeError):
    """The smallest portion does not fit; the message says what may help."""


@dataclass
class Portion:
    """How much is done at a time: what the config says, and from every failure on half of what failed."""

    size: int
    unit: str
    key: str
    """Of the config, for the message."""
    failures: int = 0
    limit: int = field(init=False)

    def __post_init__(self) -> None:
        self.limit = self.size

    def state(self) -> list[int]:
        """What `load` puts back; JSON."""
        return [self.limit, self.size, self.failures]

    def load(self, state: Sequence[int]) -> None:
        """Go on in the portions of `state`, unless the config says something else than it did: then that is tried."""
        limit, size, failures = state
        if limit == self.limit:
            self.size, self.failures = size, failures

    def run(
        self,
        what: str,
        attempt: Callable[[int], T],
        *,
        smallest: int,
        whole: int,
        undo: Callable[[], object] = lambda: None,
    ) -> T:
        """`attempt(size)`, with ever smaller sizes while it runs out of memory.

        Args:
            what: names the work, for the message.
            attempt: does all of the work in portions of at most the size it is given.
            smallest: the least size of a portion, of what cannot be divided.
            whole: the size of a portion that holds all of the work.
            undo: puts back what a failed attempt left, before the next one.

        Raises:
            OutOfMemory: the smallest portion failed too.
        """
        smallest = min(smallest, self.limit)  # `attempt` says what it thinks of a limit that is too small
        while True:
            size = max(self.size, smallest)
            try:
                return attempt(size)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).strip().partition("\n")[0].rstrip(".")
            undo()  # not before: while the error lives, so do the tensors of the frames it went through
            self._halve(what, min(size, whole), smallest, reason)

    def _halve(self, what: str, failed: int, smallest: int, reason: str) -> None:
        if failed <= smallest:
            raise OutOfMemory(
                f"out of memory in {what}, although {failed} {self.unit} is the smallest portion there is ({reason}). "
                "`fastppo plan` shows what takes the memory"
            )
        self.failures += 1
        self.size = max(failed // 2, smallest)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # blocks of the sizes that failed are of no use to smaller portions
        print(
            f"out of memory in {what} ({reason}): redone with {self.size} instead of {failed} {self.unit}, from here "
            f"on; {self.key} = {self.size} starts that way",
            flush=True,
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)
