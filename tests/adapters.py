"""Policies with adapters that several test files share."""

from typing import Any

import torch

import tiny
from batches import (
    SCORES,
    trajectories,
)
from fastppo import PPOEngine, models
from fastppo.config import MemoryConfig
from fastppo.score import action_logprobs

SMALL = MemoryConfig(share="lora", lora_rank=4)


def adapted(architecture: str = "llama", *, moved: bool = False, **kwargs: Any) -> Any:
    """A policy with adapters; `moved`: that do something."""
    policy = models.adapt(tiny.policy(architecture, **kwargs), SMALL)
    return stirred(policy) if moved else policy


def stirred(model: Any, seed: int = 0) -> Any:
    """Adapters as after some training: B is not 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_B." in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def logprobs(model: Any) -> torch.Tensor:
    return action_logprobs(model, trajectories(), temperature=1.0, max_tokens=100)


def step(made: PPOEngine, seed: int = 0) -> dict[str, float]:
    return made.update(made.score(trajectories(seed=seed), SCORES))


def resident_bytes(*roles: Any) -> int:
    """Of every storage that a parameter or a buffer of these models lies in, once."""
    tensors = (t for model in roles for t in (*model.parameters(), *model.buffers()))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
