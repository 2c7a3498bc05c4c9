"""Sums over packed sequences, and the loss weights that every aggregation mode is."""

import torch
from torch import Tensor

from fastppo import distributed
from fastppo.config_ppo import Aggregation


def sequence_sums(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(R,) -> (B,) sum over each sequence."""
    return x.new_zeros(len(cu_seqlens) - 1).index_add(0, sequence_index(cu_seqlens), x)


def sequence_index(cu_seqlens: Tensor) -> Tensor:
    """(R,) int64, the sequence each action belongs to."""
    lengths = cu_seqlens.diff().long()
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)


def loss_weights(mask: Tensor, cu_seqlens: Tensor, mode: Aggregation, divisor: float) -> Tensor:
    """The weight of every action in the loss sum of one minibatch, (R,): every aggregation is a weight vector.

    Counts are taken over all ranks, so that neither micro-batches nor ranks change the objective.

    Args:
        mask: (R,) bool, actions that train.
        cu_seqlens: (B + 1,) int32 of the minibatch.
        mode: token-mean 1/M (DAPO); seq-mean-token-mean 1/(S m_i); seq-mean-token-sum 1/S; constant 1/(S divisor)
            (Dr.GRPO), for M trained tokens in all, m_i of them in sequence i, and S sequences with m_i > 0.
    """
    live = mask.float()
    counts = sequence_sums(live, cu_seqlens)
    totals = distributed.sum_over_ranks(torch.stack([live.sum(), (counts > 0).sum().float()])).clamp(min=1)
    if mode == "token-mean":
        return live / totals[0]
    if mode == "seq-mean-token-mean":
        return live / (totals[1] * counts.clamp(min=1)[sequence_index(cu_seqlens)])
    return live / (totals[1] * (divisor if mode == "constant" else 1.0))
