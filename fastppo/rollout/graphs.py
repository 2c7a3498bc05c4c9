"""Decode steps as CUDA graphs: a step of 24 layers is some 500 launches, which cost more than the work itself."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor


def bucket(live: int, rows: int) -> int:
    """The number of rows to run for `live` of them: the next of 1, 2, 3, 4, 6, 8, 12, 16, 24 ..., at most `rows`.

    A graph is made for each, and a row too many costs little beside reading the weights.
    """
    power = 1 << (live - 1).bit_length()
    return min(power if live > 3 * power // 4 else 3 * power // 4, rows)


class Steps:
    """Runs a step for a number of rows; the second time it comes it is recorded, and replayed from then on.

    The first time runs as it is: kernels are compiled and libraries make their workspaces, which cannot be recorded.
    What a step reads and writes must stay where it is in memory, weights too; `record` False runs every step as it is.

    Args:
        step: of (rows, *key); launches work on the current stream, waits for nothing, returns the tensor it writes.
    """

    def __init__(self, step: Callable[..., Tensor], *, record: bool) -> None:
        self.step, self.record = step, record
        self.known: set[Hashable] = set()
        self.graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.pool: Any = None

    def __call__(self, *key: Any) -> Tensor:
        if key in self.graphs:
            graph, result = self.graphs[key]
            graph.replay()
            return result
        if not self.record:
            return self.step(*key)
        if key not in self.known:
            self.known.add(key)
            return self.step(*key)
        return self._recorded(key)

    def _recorded(self, key: Any) -> Tensor:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                result = self.step(*key)
        except RuntimeError as error:
            raise RuntimeError(
                f"this model's decode step cannot be recorded as a CUDA graph ({str(error).splitlines()[0]}): "
                "set rollout.cuda_graphs = false"
            ) from error
        self.pool = graph.pool()
        self.graphs[key] = graph, result
        graph.replay()  # recording ran nothing
        return result
