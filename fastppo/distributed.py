"""Sums over the ranks of torch.distributed; without it, or with one rank, they change nothing."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # the others wait while the first rank evaluates or writes a checkpoint


class RankError(RuntimeError):
    """Another rank failed; the message says which and why."""


@contextmanager
def joined() -> Iterator[None]:
    """Within the process group that torchrun describes, if it does and nobody joined it yet; left at the end."""
    joins = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys() and not dist.is_initialized()
    if joins:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield
    finally:
        if joins:
            dist.destroy_process_group()  # its threads must not outlive the interpreter


def local_rank() -> int:
    """This rank's place on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def group() -> dist.ProcessGroup | None:
    """The group that statistics are taken over; None when there is one rank."""
    return dist.group.WORLD if world_size() > 1 else None


def sum_over_ranks(x: Tensor) -> Tensor:
    """A new tensor: the sum of `x` over all ranks."""
    if world_size() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total


def gather(value: Any) -> list[Any]:
    """`value` of every rank, in rank order; what `json` can write."""
    if world_size() == 1:
        return [value]
    out: list[Any] = [None] * world_size()
    dist.all_gather_object(out, value)
    return out


def from_first(call: Callable[[], T]) -> T:
    """What `call` returns or raises on the first rank, on every rank."""
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = call()
        except Exception as error:
            outcome[1] = error
    if world_size() > 1:
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def together(call: Callable[[], T]) -> T:
    """What `call` returns on this rank. What it raises on any rank ends the run on all of them, here, where the first
    one can still save; else the others would wait in the next sum until they are killed.

    Raises:
        RankError: it raised on another rank.
    """
    if world_size() == 1:
        return call()
    outcome: list[T] = []
    failure: Exception | None = None
    try:
        outcome.append(call())
    except Exception as error:
        failure = error
    said = gather(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    failed = [f"rank {i}: {what}" for i, what in enumerate(said) if what is not None]
    if failed:
        raise RankError("; ".join(failed))
    return outcome[0]


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Add up gradients in place. Losses are divided by global counts, so the sum is the gradient of the whole batch."""
    if world_size() == 1:
        return
    pending = []
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # a rank may have had no row of it
        pending.append(dist.all_reduce(p.grad, async_op=True))
    for work in pending:
        work.wait()


def reduce_stats(stats: dict[str, Tensor]) -> dict[str, Tensor]:
    """Combine the statistics of the ops: `_max` by maximum, everything else by sum."""
    if world_size() == 1:
        return stats
    out = {name: value.clone() for name, value in stats.items()}
    for name in sorted(out):
        dist.all_reduce(out[name], dist.ReduceOp.MAX if name.endswith("_max") else dist.ReduceOp.SUM)
    return out
