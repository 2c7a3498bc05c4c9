"""Advantages, rewards and moments of packed sequences."""

from collections.abc import Callable
from typing import Any

import torch

from fastppo_kernels import gpu
from gate.entry import EVERYWHERE, Budget, Entry

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


def entry(call: Callable[[], None], per_token: float | None = None, **changes: Any) -> Entry:
    """Vectors of N numbers: bound by their latency, read 4 bytes a thread; a scan costs instructions, too."""
    limits = {} if per_token is None else {"sm_90": per_token}
    budget = Budget(registers=128, narrow=64, per_element=limits)
    return Entry(name=call.__name__.replace("_", " "), call=call, budget=budget, elements=per_thread, **changes)


def per_thread(arguments: dict[str, Any]) -> int:
    """Tokens that one of 128 threads takes per turn."""
    return arguments["BLOCK"] // 128


ENTRIES = [
    entry(gae, 90, targets=EVERYWHERE),
    entry(gae_with_holes, 160),
    entry(token_rewards, 75),
    entry(moments),
]
