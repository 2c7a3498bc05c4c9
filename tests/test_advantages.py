"""Critic-free advantages in closed form, scores and rewards put to scale, and controllers that steer the right way."""

import math
from typing import Any

import pytest
import torch

import tiny
from batches import (
    SCORES,
    engine,
    prompts,
    trajectories,
    with_random_head,
)
from fastppo import Experience, PPOConfig
from fastppo.advantages import KLController, PenaltyController, RunningMoments, shape_scores
from fastppo.aggregate import loss_weights

FOUR = ((2, 2), (2, 1), (3, 3), (1, 2))  # two prompts with two samples each
GROUPS = [5, 9, 5, 9]
FOUR_SCORES = [1.0, 0.0, 3.0, 4.0]  # group 5: 1 and 3; group 9: 0 and 4


def estimated(advantage: str, **ppo: Any) -> Experience:
    made = engine(ppo={"advantage": advantage, "kl_coef": 0.0, **ppo})
    return made.score(trajectories(FOUR, group_ids=GROUPS), FOUR_SCORES)


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        ("grpo", [-1 / math.sqrt(2), -1 / math.sqrt(2), 1 / math.sqrt(2), 1 / math.sqrt(2)]),  # std with n - 1
        ("dr_grpo", [-1.0, -2.0, 1.0, 2.0]),
        ("rloo", [-2.0, -4.0, 2.0, 4.0]),
    ],
)
def test_group_advantages_compare_the_samples_of_a_prompt(advantage: str, expected: list[float]) -> None:
    experience = estimated(advantage)
    per_action = torch.tensor(expected).repeat_interleave(torch.tensor([r for _, r in FOUR]))
    torch.testing.assert_close(experience.advantages, per_action, atol=1e-5, rtol=0)
    assert experience.returns is None and experience.values is None


@pytest.mark.parametrize("advantage", ["grpo", "dr_grpo", "rloo"])
def test_group_advantages_sum_to_zero_and_ignore_a_common_shift(advantage: str) -> None:
    made = engine(ppo={"advantage": advantage, "kl_coef": 0.0})
    groups = [0, 0, 1, 1, 1, 2, 2, 2]
    one = made.score(trajectories(group_ids=groups), SCORES)
    shift = torch.tensor([3.0, -1.0, 7.0])[torch.tensor(groups)]
    other = made.score(trajectories(group_ids=groups), torch.tensor(SCORES) + shift)
    torch.testing.assert_close(one.advantages, other.advantages, atol=1e-5, rtol=0)
    first = one.advantages[one.action_cu_seqlens[:-1].long()]
    assert float(torch.zeros(3).index_add(0, torch.tensor(groups), first).abs().max()) <= 1e-5


def test_a_prompt_with_one_sample_has_nothing_to_compare() -> None:
    with pytest.raises(ValueError, match="draw >= 2"):
        engine(ppo={"advantage": "rloo"}).score(trajectories(), SCORES)


def test_reinforce_plus_plus_is_the_discounted_reward_to_go() -> None:
    experience = estimated("reinforce++", gamma=0.5, whiten_advantages=False)
    torch.testing.assert_close(experience.advantages, torch.tensor([0.5, 1.0, 0.0, 0.75, 1.5, 3.0, 2.0, 4.0]))


def test_reinforce_plus_plus_is_whitened_over_the_batch() -> None:
    raw, white = (estimated("reinforce++", gamma=0.5, whiten_advantages=w).advantages for w in (False, True))
    torch.testing.assert_close(white, (raw - raw.mean()) / raw.std(correction=0), atol=1e-5, rtol=0)


def test_returns_use_the_advantages_before_whitening() -> None:
    """CORRECTNESS C12."""
    raw, white = (
        with_random_head(engine(ppo={"whiten_advantages": w})).score(trajectories(), SCORES) for w in (False, True)
    )
    assert raw.values is not None and raw.returns is not None
    torch.testing.assert_close(raw.returns, raw.advantages + raw.values, atol=1e-6, rtol=0)
    assert white.returns is not None and torch.equal(white.returns, raw.returns)
    assert float(white.advantages.mean().abs()) < 1e-6
    assert float(white.advantages.std(correction=0)) == pytest.approx(1, abs=1e-5)


def test_masked_responses_take_no_part_in_whitening() -> None:
    """CORRECTNESS C1."""
    made = engine(ppo={"truncation": "mask", "kl_coef": 0.0})
    experience = made.score(trajectories(finish_reasons=("stop", "length") * 4), SCORES)
    live = experience.advantages[experience.mask]
    assert float(live.mean().abs()) < 1e-6 and float(live.std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert torch.count_nonzero(experience.advantages[~experience.mask]) == 0


def test_whitened_rewards_keep_their_mean() -> None:
    """CORRECTNESS C2."""
    plain, white = (
        engine(ppo={"whiten_rewards": w, "kl_coef": 0.0}).score(trajectories(), SCORES).rewards for w in (False, True)
    )
    assert float(white.std(correction=0)) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(white, (plain - plain.mean()) / plain.std(correction=0) + plain.mean())


def test_running_moments_are_those_of_all_scores_seen() -> None:
    """CORRECTNESS C9."""
    moments, seen = RunningMoments(), torch.randn(200) * 3 + 50
    for part in seen.split([1, 7, 64, 128]):
        moments.update(part)
    assert moments.count == 200
    assert moments.mean == pytest.approx(float(seen.double().mean()), rel=1e-12)
    assert moments.std == pytest.approx(float(seen.double().std(correction=0)), rel=1e-12)


def test_normalised_scores_use_the_moments_of_all_iterations() -> None:
    """CORRECTNESS C9, through the engine."""
    made = engine(ppo={"normalize_scores": True, "kl_coef": 0.0})
    made.score(trajectories(), torch.tensor(SCORES) + 10)
    second = made.score(trajectories(), SCORES)
    seen = torch.tensor([*SCORES, *[s + 10 for s in SCORES]])
    expected = (torch.tensor(SCORES) - seen.mean()) / seen.std(correction=0)
    last = second.action_cu_seqlens[1:].long() - 1
    torch.testing.assert_close(second.rewards[last], expected, atol=1e-5, rtol=0)


def test_scores_are_normalised_then_clipped_then_replaced() -> None:
    config = PPOConfig(normalize_scores=True, clip_scores=1.0, missing_eos_score=-7.0)
    scores = torch.tensor([0.0, 0.0, 0.0, 10.0])
    cut = torch.tensor([True, False, False, False])
    shaped, _ = shape_scores(scores, None, cut, torch.tensor([0, 1, 2, 3, 4]), config, RunningMoments())
    torch.testing.assert_close(shaped, torch.tensor([-7.0, -1 / math.sqrt(3), -1 / math.sqrt(3), 1.0]))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token-mean", [0.25, 0.25, 0.0, 0.25, 0.25]),
        ("seq-mean-token-mean", [0.25, 0.25, 0.0, 0.25, 0.25]),
        ("seq-mean-token-sum", [0.5, 0.5, 0.0, 0.5, 0.5]),
        ("constant", [0.05, 0.05, 0.0, 0.05, 0.05]),
    ],
)
def test_aggregations_in_closed_form(mode: Any, expected: list[float]) -> None:
    """CORRECTNESS C5: three sequences, one of them without a trained token."""
    mask = torch.tensor([True, True, False, True, True])
    made = loss_weights(mask, torch.tensor([0, 2, 3, 5]), mode, divisor=10.0)
    torch.testing.assert_close(made, torch.tensor(expected))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("token-mean", [0.25] * 4), ("seq-mean-token-mean", [0.5, *[1 / 6] * 3]), ("seq-mean-token-sum", [0.5] * 4)],
)
def test_aggregations_weigh_length_differently(mode: Any, expected: list[float]) -> None:
    """CORRECTNESS C4, C5: lengths 1 and 3."""
    made = loss_weights(torch.ones(4, dtype=torch.bool), torch.tensor([0, 1, 4]), mode, divisor=1.0)
    torch.testing.assert_close(made, torch.tensor(expected))


@pytest.mark.parametrize(("kl", "factor"), [(6.6, 1.01), (5.4, 0.99), (60.0, 1.02), (-60.0, 0.98), (6.0, 1.0)])
def test_adaptive_kl_controller_moves_towards_its_target(kl: float, factor: float) -> None:
    """arXiv:1909.08593: proportional, its error clipped at 20 %."""
    controller = KLController(0.2, target=6.0, horizon=1000)
    controller.update(kl, num_sequences=100)
    assert controller.coef == pytest.approx(0.2 * factor)


def test_a_controller_without_target_stays() -> None:
    controller = KLController(0.2)
    controller.update(100.0, num_sequences=100)
    assert controller.coef == 0.2


@pytest.mark.parametrize(("kl", "coef"), [(0.016, 2.0), (0.006, 0.5), (0.012, 1.0), (0.008, 1.0)])
def test_penalty_controller_doubles_and_halves(kl: float, coef: float) -> None:
    """Schulman et al. 2017, section 4."""
    controller = PenaltyController(1.0, target=0.01)
    controller.update(kl)
    assert controller.coef == coef


@pytest.mark.parametrize(("seed", "rises"), [(2, True), (0, False)], ids=["far", "at the reference"])
def test_the_engine_steers_its_kl_coefficient(seed: int, rises: bool) -> None:
    made = engine(
        tiny.policy(seed=0),
        reference=tiny.policy(seed=seed),
        ppo={"kl_target": 0.1, "kl_horizon": 80},
    )
    rollout = made.generate(prompts())
    logged = made.update(made.score(rollout, SCORES))
    assert logged["objective/kl_coef"] == 0.05
    assert made.kl.coef == pytest.approx(0.05 * (1.02 if rises else 0.98))
