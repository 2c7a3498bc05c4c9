"""Micro-batches of a token budget: what goes through a model in one forward."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastppo.attention import Packing, plan
from fastppo.batch import Rollout
from fastppo.checks import require


@dataclass(frozen=True)
class MicroBatch:
    """Some sequences of a rollout, packed. n tokens, r actions."""

    input_ids: Tensor  # (n,) int64
    position_ids: Tensor  # (n,) int64, restart at each sequence
    packing: Packing
    rows: Tensor  # (r,) int64, the state each action was taken in: the token before it
    targets: Tensor  # (r,) int64, the actions
    actions: Tensor  # (r,) int64, their places among the R actions of the rollout
    tokens: Tensor  # (n,) int64, places among the N tokens of the rollout


def microbatches(rollout: Rollout, max_tokens: int, sequences: Sequence[int] | None = None) -> Iterator[MicroBatch]:
    """Cut `sequences` (default: all) into micro-batches of at most `max_tokens` tokens, in order.

    Raises:
        ValueError: one sequence alone is over the budget.
    """
    order = range(len(rollout)) if sequences is None else sequences
    _, lengths = _spans(rollout, order)
    group: list[int] = []
    total = 0
    for i, length in zip(order, lengths.tolist(), strict=True):
        require(
            length <= max_tokens,
            f"sequence {i} has {length} tokens, more than max_tokens_per_microbatch = {max_tokens}: "
            "raise it to at least that",
        )
        if group and total + length > max_tokens:
            yield gather(rollout, group)
            group, total = [], 0
        group.append(i)
        total += length
    if group:
        yield gather(rollout, group)


def gather(rollout: Rollout, sequences: Sequence[int]) -> MicroBatch:
    """Pack the named sequences of a rollout."""
    device = rollout.input_ids.device
    starts, lengths = _spans(rollout, sequences)
    sequence_of = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
    position_ids = torch.arange(len(sequence_of), device=device) - (lengths.cumsum(0) - lengths)[sequence_of]
    tokens = starts[sequence_of] + position_ids
    at = rollout.loss_mask[tokens].nonzero().squeeze(1)
    return MicroBatch(
        input_ids=rollout.input_ids[tokens],
        position_ids=position_ids,
        packing=plan(lengths.tolist(), device, recurring=True),
        rows=at - 1,
        targets=rollout.input_ids[tokens[at]],
        actions=rollout.action_places[tokens[at]],
        tokens=tokens,
    )


def _spans(rollout: Rollout, sequences: Sequence[int]) -> tuple[Tensor, Tensor]:
    """First token and length of each named sequence, int64."""
    chosen = torch.tensor(list(sequences), device=rollout.input_ids.device)
    starts = rollout.cu_seqlens[chosen].long()
    return starts, rollout.cu_seqlens[chosen + 1].long() - starts
