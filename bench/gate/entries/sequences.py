"""Advantages, rewards and moments of packed sequences."""

import torch

from fastppo_kernels import gpu
from gate.entry import Budget, Entry

N = 4096
TOKENS, MASK = torch.ones(N), torch.ones(N, dtype=torch.bool)
CU_SEQLENS = torch.tensor([0, N // 2, N], dtype=torch.int32)


def gae() -> None:
    gpu.gae(TOKENS, TOKENS, CU_SEQLENS, gamma=0.99, lam=0.95)


def gae_with_holes() -> None:
    """Tool output in the sequences, some of which were cut."""
    gpu.gae(TOKENS, TOKENS, CU_SEQLENS, gamma=0.99, lam=0.95, mask=MASK, bootstrap_values=torch.ones(2))


def token_rewards() -> None:
    gpu.token_rewards(torch.ones(2), TOKENS, TOKENS, CU_SEQLENS, kl_coef=0.1, kl_estimator="k3", mask=MASK)


def moments() -> None:
    gpu.moments(TOKENS, MASK)


SMALL = Budget(registers=128, narrow=64)  # vectors of N numbers: bound by their latency, read 4 bytes a thread
ENTRIES = [
    Entry(name=call.__name__.replace("_", " "), call=call, budget=SMALL)
    for call in (gae, gae_with_holes, token_rewards, moments)
]
