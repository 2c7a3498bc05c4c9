"""Engines, random trajectories and recorded gradients that several test files share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import tiny
from fastppo import OptimizerConfig, PPOConfig, PPOEngine, Prompts, Rollout, RolloutConfig, models

LENGTHS = ((3, 5), (1, 2), (6, 9), (2, 1), (4, 4), (5, 7), (2, 6), (3, 3))  # (prompt, response) tokens of 8 sequences
SCORES = [0.3, -1.2, 2.0, 0.5, -0.4, 1.1, 0.0, -2.2]


def tokens(count: int, generator: torch.Generator | None = None, vocab: int = tiny.VOCAB) -> list[int]:
    return torch.randint(0, vocab, (count,), generator=generator).tolist()


def trajectories(
    lengths: Sequence[tuple[int, int]] = LENGTHS, *, seed: int = 0, vocab: int = tiny.VOCAB, **kwargs: Any
) -> Rollout:
    """Random token ids packed as a rollout from elsewhere; `kwargs` go to `Rollout.pack`."""
    generator = torch.Generator().manual_seed(seed)
    pairs = [(tokens(p, generator, vocab), tokens(r, generator, vocab)) for p, r in lengths]
    return Rollout.pack([p for p, _ in pairs], [r for _, r in pairs], **kwargs)


def prompts(count: int = 8, *, seed: int = 0, longest: int = 6) -> Prompts:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return Prompts(token_ids=tuple(tuple(tokens(n, generator)) for n in sizes))


def engine(
    policy: PreTrainedModel | None = None,
    *,
    ppo: dict[str, Any] | None = None,
    rollout: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    **kwargs: Any,
) -> PPOEngine:
    """A PPOEngine on a tiny policy; the settings given replace a few small ones."""
    adam = OptimizerConfig(**{"lr": 1e-3, "schedule": "constant", **(optimizer or {})})
    return PPOEngine(
        tiny.policy() if policy is None else policy,
        ppo=PPOConfig(**{"num_epochs": 1, **(ppo or {})}),
        rollout=RolloutConfig(**{"temperature": 1.0, "max_new_tokens": 8, **(rollout or {})}),
        policy_optimizer=adam,
        **{"critic_optimizer": adam, **kwargs},
    )


def bfloat16(model: PreTrainedModel) -> PreTrainedModel:
    """As loading a bfloat16 checkpoint makes it: parameters, not the rotary frequencies."""
    for p in model.parameters():
        p.data = p.data.bfloat16()
    return model


def with_random_head(made: PPOEngine, seed: int = 0) -> PPOEngine:
    """Give the critic values that differ from state to state."""
    assert made.critic is not None
    head = models.value_head(made.critic)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed)))
    return made


def weights(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def largest_gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def recorded_gradients(made: PPOEngine) -> dict[str, Tensor]:
    """Filled with the gradient of every parameter when the optimizers step."""
    found: dict[str, Tensor] = {}

    def record(role: str, model: Any) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            found.update({f"{role}.{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

        return hook

    for role, trainable in (("policy", made._policy), ("critic", made._critic)):
        if trainable is not None:
            trainable.optimizer.register_step_pre_hook(record(role, trainable.model))
    return found


def assert_same_numbers(a: dict[str, float], b: dict[str, float], tolerance: float = 1e-6) -> None:
    """Two sets of logged metrics agree, absolutely for small numbers and relatively for large ones."""
    assert a.keys() == b.keys()
    bad = {k: (a[k], b[k]) for k in a if not abs(a[k] - b[k]) <= tolerance * max(1.0, abs(a[k]))}
    assert not bad, bad
