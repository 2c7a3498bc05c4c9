"""The update: epochs and minibatches, early stop and roll-back, critic warm-up, and what an experience is good for."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from batches import (
    LENGTHS,
    SCORES,
    engine,
    equal_weights,
    prompts,
    trajectories,
    weights,
)
from fastppo import PPOConfig, PPOEngine, update
from fastppo.aggregate import sequence_index
from fastppo.memory.ledger import Ledger
from fastppo.microbatch import microbatches


def step(made: PPOEngine, seed: int = 0) -> dict[str, float]:
    return made.update(made.score(trajectories(seed=seed), SCORES))


@pytest.mark.parametrize("minibatches", [1, 3, 8, 50])
def test_every_sequence_is_trained_once_per_epoch_in_a_new_order(
    minibatches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CORRECTNESS D7: also when the minibatches do not divide the batch."""
    seen: list[list[int]] = []
    inner = update._policy_gradient

    def spy(model: Any, experience: Any, minibatch: Any, *rest: Any) -> Any:
        seen.append(minibatch.sequences)
        own = torch.isin(sequence_index(experience.action_cu_seqlens), torch.tensor(minibatch.sequences))
        torch.testing.assert_close(minibatch.weights[own], torch.full([int(own.sum())], 1 / int(own.sum())))
        return inner(model, experience, minibatch, *rest)

    monkeypatch.setattr(update, "_policy_gradient", spy)
    metrics = step(engine(ppo={"num_epochs": 3, "num_minibatches": minibatches}))
    per_epoch = min(minibatches, len(LENGTHS))
    assert metrics["policy/steps"] == len(seen) == 3 * per_epoch
    sizes = [len(s) for s in seen]
    assert max(sizes) - min(sizes) <= 1
    epochs = [sum(seen[i : i + per_epoch], []) for i in range(0, len(seen), per_epoch)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


class Elements(TorchDispatchMode):
    """How many tensor elements every operation made, in all."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else [out]:
            if isinstance(made, torch.Tensor) and not any(made is arg for arg in args):
                self.total += made.numel()
        return out


def test_cutting_a_batch_into_minibatches_costs_what_the_batch_is_long() -> None:
    """Per sequence and element as much for a batch of 1024 as for one of 64: nothing looks at the whole batch again."""
    costs = []
    for size in (64, 1024):
        experience = engine().score(trajectories(LENGTHS * (size // 8)), SCORES * (size // 8))
        objective = update.Objective(1.0, 0.0, 0.0, 1.0, True, True)
        with Elements() as elements:
            config = PPOConfig(num_minibatches=size // 4)
            for minibatch in update._minibatches(experience, config, objective, torch.Generator()):
                assert list(microbatches(experience.rollout, 1000, minibatch.sequences))
        costs.append(elements.total / size)
    assert costs[1] <= 1.1 * costs[0]


def test_the_seed_fixes_the_order_and_nothing_else_does() -> None:
    one, same, other = (engine(ppo={"num_minibatches": 4}, seed=s) for s in (3, 3, 4))
    for made in (one, same, other):
        torch.rand(made.generator.initial_seed())  # the global generator is elsewhere each time
        step(made)
    assert equal_weights(weights(one.policy), weights(same.policy))
    assert not equal_weights(weights(one.policy), weights(other.policy))


@pytest.mark.parametrize("roll_back", [False, True])
def test_target_kl_stops_the_update(roll_back: bool) -> None:
    """CORRECTNESS D9: after the step that went too far, which roll-back undoes bit for bit."""
    settings = {"num_epochs": 5, "target_kl": 1e-4, "roll_back": roll_back}
    made, single = engine(ppo=settings, optimizer={"lr": 1e-2}), engine(optimizer={"lr": 1e-2})
    before = weights(made.policy)
    metrics = step(made)
    step(single)
    assert metrics["policy/early_stop"] == 1.0 and metrics["policy/steps"] == 1.0
    assert metrics["policy/kl_at_stop"] > 1e-4
    assert equal_weights(weights(made.policy), before if roll_back else weights(single.policy))


def test_roll_back_holds_one_copy_of_weights_and_moments() -> None:
    """Of those before the last step, and no second one while that is made or put back; by the memory handed out."""
    peaks, copy = [], 0
    for settings in ({}, {"roll_back": True, "target_kl": 1e9}, {"roll_back": True, "target_kl": 0.01}):
        with Ledger() as ledger:
            made = engine(ppo={"num_epochs": 4, "num_minibatches": 2, "max_tokens_per_microbatch": 15, **settings})
            experience = made.score(trajectories(), SCORES)
            metrics = made.update(experience)
            peaks.append(ledger.peak.total())
        stops = settings.get("target_kl") == 0.01
        assert metrics["policy/early_stop"] == float(stops) and (not stops or metrics["policy/steps"] > 1)
        copy = sum(x.numel() * x.element_size() for x in made._policy.state().values())
    assert 0.5 * copy < peaks[1] - peaks[0] <= 1.01 * copy and peaks[2] <= 1.01 * peaks[1]


def test_roll_back_also_restores_the_optimizer() -> None:
    made = engine(ppo={"num_epochs": 5, "target_kl": 1e-4, "roll_back": True}, optimizer={"lr": 1e-2})
    step(made)
    assert not any(made._policy.optimizer.state.values())
    assert all(p.grad is None or not p.grad.any() for p in made.policy.parameters())


def test_the_critic_goes_on_where_the_policy_stops() -> None:
    """It has its own weights, and returns that do not depend on how far the policy went."""
    stopped = engine(ppo={"num_epochs": 3, "target_kl": 1e-4}, optimizer={"lr": 1e-2})
    free = engine(ppo={"num_epochs": 3}, optimizer={"lr": 1e-2})
    assert step(stopped)["policy/early_stop"] == 1.0
    step(free)
    assert equal_weights(weights(stopped.critic), weights(free.critic))
    assert not equal_weights(weights(stopped.policy), weights(free.policy))


def test_a_far_target_kl_never_stops() -> None:
    made, free = (engine(ppo={"num_epochs": 3, "target_kl": target}) for target in (1e3, None))
    assert step(made)["policy/early_stop"] == 0.0
    step(free)
    assert equal_weights(weights(made.policy), weights(free.policy))


def test_critic_warm_up_trains_the_critic_alone() -> None:
    """CORRECTNESS D2: then the policy starts, with ratio 1."""
    made = engine(ppo={"critic_warmup_steps": 2, "num_epochs": 2})
    policy, critic = weights(made.policy), weights(made.critic)
    for seed in range(2):
        metrics = step(made, seed)
        assert equal_weights(weights(made.policy), policy)
        assert not equal_weights(weights(made.critic), critic)
        assert metrics["policy/steps"] == 0.0
        critic = weights(made.critic)
    metrics = step(made)
    assert metrics["val/ratio_max_first"] == 1.0
    assert not equal_weights(weights(made.policy), policy)


def test_an_experience_of_an_older_policy_keeps_its_ratio() -> None:
    """Two updates on one experience go on from where the first ended; nothing is taken for ratio 1."""
    made = engine(rollout={"old_logprobs": "recompute"}, optimizer={"lr": 1e-2})
    experience = made.score(trajectories(), SCORES)
    made.update(experience)
    assert made.update(experience)["val/ratio_max_first"] > 1.01


def test_an_old_experience_without_log_probs_is_refused() -> None:
    made = engine(ppo={"kl_coef": 0.0})
    experience = made.score(trajectories(), SCORES)
    assert experience.logprobs is None
    made.update(experience)
    with pytest.raises(ValueError, match="score again"):
        made.update(experience)


def test_kl_penalty_objective_adapts_its_coefficient() -> None:
    far, near = (
        engine(ppo={"objective": "kl-penalty", "num_epochs": 3, "old_kl_target": t}, optimizer={"lr": 3e-3})
        for t in (1e-9, 1e3)
    )
    for made, coef in ((far, 2.0), (near, 0.5)):
        metrics = step(made)
        assert metrics["policy/old_kl_coef"] == 1.0 and made.penalty.coef == coef
        assert metrics["policy/clipfrac_avg"] == 0.0


def test_a_sampler_s_gap_is_weighted_and_capped() -> None:
    """CORRECTNESS A12, through the engine: min(trainer / sampler, cap) for every action."""
    made = engine(ppo={"importance_cap": 1.5}, rollout={"gap_stop": 1.0})
    rollout = made.generate(prompts())
    assert rollout.logprobs is not None
    gap = torch.linspace(0.0, 1.0, len(rollout.logprobs))
    experience = made.score(replace(rollout, logprobs=rollout.logprobs - gap), SCORES)
    torch.testing.assert_close(experience.is_weights, gap.exp().clamp(max=1.5), atol=1e-4, rtol=0)


def test_critic_and_policy_share_no_parameter() -> None:
    made = engine(tiny.policy("qwen2"))
    assert made.critic is not None
    assert not {id(p) for p in made.policy.parameters()} & {id(p) for p in made.critic.parameters()}


@pytest.mark.parametrize(
    ("ratio", "advantage", "clipped"),
    [(0.805, -1, 0), (0.795, -1, 1), (0.5, 1, 0), (1.275, 1, 0), (1.285, 1, 1), (2.0, -1, 0)],
)
def test_the_clip_range_is_the_configured_one(ratio: float, advantage: float, clipped: float) -> None:
    """Below 1 - clip_low for negative advantages, above 1 + clip_high for positive ones; there is no gradient there."""
    made = engine(ppo={"clip_low": 0.2, "clip_high": 0.28}, rollout={"old_logprobs": "recompute"})
    experience = made.score(trajectories(), SCORES)
    assert experience.logprobs is not None
    shifted = replace(
        experience,
        logprobs=experience.logprobs - math.log(ratio),
        advantages=torch.full_like(experience.advantages, advantage),
        policy_version=-1,
    )
    metrics = made.update(shifted)
    assert metrics["val/ratio"] == pytest.approx(ratio, rel=1e-4)
    assert metrics["policy/clipfrac_avg"] == clipped
    assert (metrics["policy/grad_norm"] == 0) == bool(clipped)


@pytest.mark.parametrize(("divisor", "expected"), [(None, 8.0), (5, 5.0)])
def test_constant_aggregation_divides_by_the_response_limit_or_by_what_is_given(
    divisor: int | None, expected: float
) -> None:
    """CORRECTNESS C5."""
    total = step(engine(ppo={"aggregation": "seq-mean-token-sum"}))
    constant = step(engine(ppo={"aggregation": "constant", "loss_divisor": divisor}))
    assert total["policy/grad_norm"] / constant["policy/grad_norm"] == pytest.approx(expected, rel=1e-5)
