"""Decode steps as CUDA graphs: a step of 24 layers is some 500 launches, which cost more than the work itself."""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from fastppo.out_of_memory import is_out_of_memory

RECORD_AT = 8  # uses of a number of rows until it is recorded: recording takes the time of several steps


def bucket(live: int, rows: int) -> int:
    """The number of rows to run for `live` of them: the next of 1, 2, 3, 4, 6, 8, 12, 16, 24 ..., at most `rows`.

    A graph is made for each, and a row too many costs little beside reading the weights.
    """
    power = 1 << (live - 1).bit_length()
    return min(power if live > 3 * power // 4 else 3 * power // 4, rows)


class Steps:
    """Runs a step for a number of rows; the eighth time it comes it is recorded, and replayed from then on.

    The first times run as they are: kernels are compiled and libraries make their workspaces, which cannot be recorded.
    What a step reads and writes must stay where it is in memory, weights too; `record` False runs every step as it is.

    Args:
        step: of (rows, *key); launches work on the current stream, waits for nothing, returns the tensor it writes.
        device: the GPU whose steps are recorded, which need not be the current one.
    """

    def __init__(self, step: Callable[..., Tensor], device: torch.device, *, record: bool) -> None:
        self.step, self.device, self.record = step, device, record
        self.uses: dict[Hashable, int] = {}
        self.graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.pool: Any = None

    def __call__(self, *key: Any) -> Tensor:
        if key in self.graphs:
            graph, result = self.graphs[key]
            graph.replay()
            return result
        if not self.record:
            return self.step(*key)
        self.uses[key] = self.uses.get(key, 0) + 1
        if self.uses[key] < RECORD_AT:
            return self.step(*key)
        return self._recorded(key)

    def _recorded(self, key: Any) -> Tensor:
        graph, stream = torch.cuda.CUDAGraph(), _side_stream(self.device)
        try:
            with (
                torch.cuda.device(self.device),
                torch.cuda.stream(torch.cuda.current_stream(self.device)),  # back on it too where a recording fails
                torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"),
            ):
                result = self.step(*key)
        except RuntimeError as error:
            if (cause := _out_of_memory(error)) is not None:
                raise cause from None  # the rollout is redone with fewer rows
            raise RuntimeError(
                f"this model's decode step cannot be recorded as a CUDA graph ({str(error).splitlines()[0]}): "
                "set rollout.cuda_graphs = false"
            ) from error
        self.pool = graph.pool()
        self.graphs[key] = graph, result
        graph.replay()  # recording ran nothing
        return result


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """What is recorded on: one per GPU, as the BLAS keeps a workspace for every stream it has met."""
    return torch.cuda.Stream(device)


def _out_of_memory(error: BaseException | None) -> BaseException | None:
    """It, or what it came from: the end of a recording that failed raises an error of its own."""
    while error is not None and not is_out_of_memory(error):
        error = error.__context__
    return error
