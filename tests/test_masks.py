"""Empty responses, tool output and token scores: only actions are rewarded, and only actions learn."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from batches import (
    LENGTHS,
    SCORES,
    engine,
    equal_weights,
    largest_gap,
    recorded_gradients,
    trajectories,
    weights,
    with_random_head,
)
from fastppo import Rollout

EOS = 7
PLAIN: dict[str, Any] = {"kl_coef": 0.0, "whiten_advantages": False}


def test_an_empty_response_contributes_nothing() -> None:
    """CORRECTNESS B11."""
    pairs = trajectories().sequences()
    found = []
    for extra in ([], [([1, 2, 3], [])]):
        made = with_random_head(engine(ppo={"aggregation": "seq-mean-token-mean"}))
        gradients = recorded_gradients(made)
        rows = [*pairs, *extra]
        made.update(made.score(Rollout.pack([p for p, _ in rows], [r for _, r in rows]), [*SCORES, 9.0][: len(rows)]))
        found.append(gradients)
    assert largest_gap(*found) <= 1e-6


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("response", [[], [EOS]], ids=["empty", "ended at once"])
def test_nothing_but_trivial_responses_is_finite(response: list[int], aggregation: str) -> None:
    """CORRECTNESS B10, B11."""
    made = engine(ppo={"num_epochs": 2, "aggregation": aggregation, "kl_coef": 0.0})
    before = weights(made.policy)
    metrics = made.update(made.score(Rollout.pack([[1, 2], [3]], [response, response]), [1.0, 1.0]))
    assert all(torch.isfinite(torch.tensor(list(metrics.values())))), metrics
    assert all(bool(p.isfinite().all()) for p in made.policy.parameters())
    assert response or equal_weights(weights(made.policy), before)


HOLES = [[t % 3 != 1 for t in range(r)] for _, r in LENGTHS]  # tool output at 1, 4, 7


def test_tool_output_gets_no_reward_and_no_gradient() -> None:
    """CORRECTNESS B12: one number per action, and the gradient is that of a loss over the actions alone."""
    rollout = trajectories(loss_masks=HOLES)
    made = with_random_head(engine(ppo={"kl_coef": 0.3}))
    experience = made.score(rollout, SCORES)
    actions = sum(sum(row) for row in HOLES)
    for name in ("logprobs", "values", "rewards", "advantages", "returns"):
        assert getattr(experience, name).shape == (actions,), name
    whole = made.score(trajectories(), SCORES)
    keep = torch.tensor([x for row in HOLES for x in row])
    torch.testing.assert_close(experience.logprobs, whole.logprobs[keep], atol=5e-6, rtol=0)  # pyright: ignore
    found, others = recorded_gradients(made), recorded_gradients(masked := with_random_head(engine()))
    made.update(experience)
    advantages = torch.zeros(len(keep)).masked_scatter(keep, experience.advantages)
    masked.update(replace(masked.score(trajectories(), SCORES), advantages=advantages, mask=keep))
    policy = {n: g for n, g in found.items() if n.startswith("policy")}
    assert largest_gap(policy, {n: others[n] for n in policy}) <= 1e-6


def test_the_score_goes_to_the_last_action_before_tool_output() -> None:
    rollout = Rollout.pack([[1]], [[2, 3, 4, 5]], loss_masks=[[True, False, True, False]])
    experience = engine(ppo=PLAIN).score(rollout, [1.0])
    torch.testing.assert_close(experience.rewards, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(experience.advantages, torch.tensor([0.95, 1.0]))


def test_token_scores_are_rewards_of_their_tokens_once() -> None:
    rollout = Rollout.pack([[1], [2, 3]], [[2, 3, 4], [5]])
    experience = engine(ppo=PLAIN).score(rollout, [[0.5, -1.0, 2.0], [3.0]])
    torch.testing.assert_close(experience.rewards, torch.tensor([0.5, -1.0, 2.0, 3.0]))
    assert experience.metrics["objective/scores"] == pytest.approx((1.5 + 3.0) / 2)
