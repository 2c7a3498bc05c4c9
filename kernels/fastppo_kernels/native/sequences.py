"""Ops over packed sequences in C++: CPU tensors only."""

import torch
from torch import Tensor

from fastppo_kernels.native.library import load


def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float,
    lam: float,
    mask: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), (N,) float32, accumulated in float64. See `fastppo_kernels.gae`.

    Raises:
        ValueError: cu_seqlens does not rise from 0 or more to N at most.
    """
    given = (rewards, values, cu_seqlens.cpu(), mask, bootstrap_values)
    inputs = [None if x is None else x.contiguous() for x in given]
    advantages = torch.zeros(rewards.shape[0], dtype=torch.float32)
    returns = torch.zeros_like(advantages)
    pointers = [None if x is None else x.data_ptr() for x in inputs]
    outputs = (advantages.data_ptr(), returns.data_ptr())
    num_sequences, num_tokens = cu_seqlens.shape[0] - 1, rewards.shape[0]
    if load().fastppo_gae(num_sequences, num_tokens, *pointers, gamma, lam, *outputs):
        raise ValueError(
            f"cu_seqlens must rise from 0 or more to at most N = {num_tokens}, got {cu_seqlens.tolist()[:8]}...; "
            "pass the cumulative lengths of the sequences"
        )
    return advantages, returns
