"""Micro-batches change no number; a policy is itself before the first step; without a signal nothing moves."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny
from batches import (
    LENGTHS,
    SCORES,
    assert_same_numbers,
    engine,
    equal_weights,
    largest_gap,
    prompts,
    recorded_gradients,
    trajectories,
    weights,
    with_random_head,
)
from fastppo import Experience, OptimizerConfig
from fastppo.attention import packed_attention, plan
from fastppo.score import action_logprobs

BUDGETS = (15, 20, 33, 1000)  # the longest sequence alone, two sizes between, everything at once
EVERYTHING = BUDGETS[-1]
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant")


def off_policy(experience: Experience) -> Experience:
    """As if the policy had moved since: ratios on both sides of the clip, values out of reach of the value clip."""
    assert experience.logprobs is not None and experience.values is not None
    noise = torch.randn(len(experience.logprobs), generator=torch.Generator().manual_seed(1))
    return replace(
        experience,
        logprobs=experience.logprobs + 0.3 * noise,
        values=experience.values + 0.3 * noise,
        policy_version=-1,
    )


def one_update(budget: int, **ppo: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients and metrics of one step with every term of the objective switched on."""
    made = with_random_head(
        engine(
            ppo={"max_tokens_per_microbatch": budget, "entropy_coef": 0.1, "kl_in": "loss", "value_coef": 1.0, **ppo},
            rollout={"old_logprobs": "recompute"},
        )
    )
    found = recorded_gradients(made)
    made.ppo, asked = (
        replace(made.ppo, max_tokens_per_microbatch=EVERYTHING),
        made.ppo,
    )  # one experience for all budgets
    experience = off_policy(made.score(trajectories(), SCORES))
    made.ppo = asked
    return found, made.update(experience)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_change_no_gradient_and_no_logged_number(aggregation: str) -> None:
    """CORRECTNESS P15, P16, C4."""
    gradients, metrics = one_update(EVERYTHING, aggregation=aggregation)
    assert metrics["policy/clipfrac_avg"] > 0 and metrics["val/clipfrac_avg"] > 0
    for budget in BUDGETS[:-1]:
        others, logged = one_update(budget, aggregation=aggregation)
        for name, expected in gradients.items():
            tolerance = 1e-6 * max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(
                others[name], expected, atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert_same_numbers(logged, metrics)


@pytest.mark.parametrize("minibatches", [1, 3])
def test_micro_batches_change_no_weight_over_several_steps(minibatches: int) -> None:
    made = [
        engine(ppo={"max_tokens_per_microbatch": b, "num_epochs": 2, "num_minibatches": minibatches}) for b in BUDGETS
    ]
    for one in made:
        one.update(one.score(trajectories(), SCORES))
    for other in made[1:]:
        assert largest_gap(weights(other.policy), weights(made[0].policy)) <= 1e-5
        assert largest_gap(weights(other.critic), weights(made[0].critic)) <= 1e-5


def test_packed_attention_is_exact_for_every_mix_of_lengths() -> None:
    """Also where a padded bucket is by chance as long as the whole row: 5 and 8 padded to 16 = 3 + 5 + 8."""
    q = torch.randn(1, 2, 27, 4)
    for lengths in itertools.combinations_with_replacement(range(1, 10), 3):
        n = sum(lengths)
        made, _ = packed_attention(
            torch.nn.Identity(), q[:, :, :n], q[:, :, :n], q[:, :, :n], None, packing=plan(lengths)
        )
        alone = [F.scaled_dot_product_attention(x, x, x, is_causal=True) for x in q[:, :, :n].split(lengths, dim=2)]
        torch.testing.assert_close(made, torch.cat(alone, dim=2).transpose(1, 2), atol=1e-6, rtol=0, msg=str(lengths))


@pytest.mark.parametrize("budget", BUDGETS[:-1])
def test_micro_batches_change_no_score(budget: int) -> None:
    fields = ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns")
    one, all_at_once = (
        with_random_head(engine(ppo={"max_tokens_per_microbatch": b})).score(trajectories(), SCORES)
        for b in (budget, EVERYTHING)
    )
    for name in fields:
        torch.testing.assert_close(getattr(one, name), getattr(all_at_once, name), atol=5e-6, rtol=1e-6)
    assert_same_numbers(one.metrics, all_at_once.metrics, 5e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("minibatches", [1, 4])
@pytest.mark.parametrize("source", ["sampled", "foreign"])
def test_first_minibatch_has_ratio_one_and_clips_nothing(source: str, minibatches: int, temperature: float) -> None:
    """CORRECTNESS P5, A4: exactly."""
    made = engine(ppo={"num_minibatches": minibatches, "num_epochs": 2}, rollout={"temperature": temperature})
    rollout = made.generate(prompts()) if source == "sampled" else trajectories()
    metrics = made.update(made.score(rollout, SCORES))
    assert metrics["val/ratio_max_first"] == 1.0
    assert metrics["policy/clipfrac_first"] == 0.0
    assert metrics["val/ratio_max"] > 1.0  # and it did move


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("source", ["sampled", "foreign"])
def test_recomputed_ratio_is_one_to_rounding(source: str, temperature: float) -> None:
    """Log-probs taken as another policy's, so that the trainer's forward computes the ratio: of `score` for foreign
    trajectories, of the sampler with its padding and cache for its own."""
    made = engine(ppo={"max_tokens_per_microbatch": 20}, rollout={"temperature": temperature})
    sampled = source == "sampled"
    experience = made.score(made.generate(prompts()) if sampled else trajectories(), SCORES)
    assert (experience.logprobs is experience.rollout.logprobs) == sampled
    metrics = made.update(replace(experience, policy_version=-1))
    assert abs(metrics["val/ratio_max"] - 1) <= 1e-5
    assert metrics["val/ratio_var"] <= 1e-9
    assert metrics["policy/clipfrac_avg"] == 0.0


def test_log_probs_hardly_depend_on_the_micro_batch() -> None:
    model, rollout = tiny.policy(), trajectories(LENGTHS * 4)
    one, other = (action_logprobs(model, rollout, temperature=1.0, max_tokens=b) for b in (15, 1000))
    assert float((one - other).abs().mean()) <= 1e-5


@pytest.mark.parametrize(("old_logprobs", "tolerance"), [("recompute", 0.0), ("sampler", 1e-6)])
def test_kl_to_the_reference_is_zero_before_the_first_step(old_logprobs: str, tolerance: float) -> None:
    """CORRECTNESS P7: exactly when both come from the trainer, within rounding when one is the sampler's."""
    made = engine(rollout={"old_logprobs": old_logprobs})
    experience = made.score(made.generate(prompts(32)), [0.0] * 32)
    assert abs(experience.metrics["objective/kl"]) <= tolerance


def test_values_are_zero_before_the_first_step() -> None:
    """CORRECTNESS D1."""
    experience = engine().score(trajectories(), SCORES)
    assert experience.values is not None and torch.count_nonzero(experience.values) == 0


def test_learning_rate_zero_changes_nothing() -> None:
    """CORRECTNESS F2, A14: 20 iterations leave weights, ratio, KL and the sampler where they were."""
    made = engine(ppo={"num_epochs": 2, "num_minibatches": 2}, optimizer={"lr": 0.0})
    before, fixed = (weights(made.policy), weights(made.critic)), trajectories()
    logprobs = action_logprobs(made.policy, fixed, temperature=1.0, max_tokens=1000)
    for step in range(20):
        batch = prompts(4, seed=step)
        metrics = made.update(made.score(made.generate(batch), SCORES[:4]))
        assert abs(metrics["val/ratio_max"] - 1) <= 1e-5 and metrics["policy/clipfrac_avg"] == 0
        assert abs(metrics["objective/kl"]) <= 5e-6
    assert equal_weights(weights(made.policy), before[0]) and equal_weights(weights(made.critic), before[1])
    assert torch.equal(action_logprobs(made.policy, fixed, temperature=1.0, max_tokens=1000), logprobs)


@pytest.mark.parametrize("advantage", ["gae", "grpo", "dr_grpo", "rloo", "reinforce++"])
def test_constant_reward_moves_no_weight(advantage: str) -> None:
    """CORRECTNESS F3: every advantage is 0, so the policy stays bit for bit. lam = 1: V = 0 everywhere."""
    made = engine(
        ppo={"advantage": advantage, "kl_coef": 0.0, "lam": 1.0, "num_epochs": 2, "truncation": "none"},
        rollout={"samples_per_prompt": 2},
        optimizer={"lr": 1e-2},
        critic_optimizer=OptimizerConfig(lr=0.0),  # its error would be a signal
    )
    before = weights(made.policy)
    for step in range(3):
        experience = made.score(made.generate(prompts(4, seed=step)), [0.7] * 8)
        assert torch.count_nonzero(experience.advantages) == 0
        made.update(experience)
    assert equal_weights(weights(made.policy), before)
