"""The objective from log-probs."""

import torch

from fastppo_kernels import gpu
from fastppo_kernels.reference import PPORows
from fastppo_kernels.settings import PPOSettings
from gate.entry import Budget, Entry


def tokens() -> None:
    """One launch with every vector there is."""
    x = torch.ones(8)
    settings = PPOSettings(kl_coef=0.1, dual_clip=3.0, entropy_coef=0.01)
    gpu.ppo_tokens(x, x, PPORows(x, x, x, x, x, x), settings)


ENTRIES = [Entry(name="ppo tokens", call=tokens, budget=Budget(registers=128))]
