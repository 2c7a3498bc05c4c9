"""The probe of the sampler: what stops a run, what is corrected, and what it costs."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from batches import SCORES, engine, equal_weights, prompts, weights
from fastppo import PPOEngine, Rollout
from fastppo.checks import RolloutError

MANY = 256
SCORES_OF_MANY = [float(i % 7) for i in range(MANY)]
LONG: dict[str, Any] = {"max_new_tokens": 16}


def sampled(made: PPOEngine, *, exact: bool, count: int = MANY) -> Rollout:
    return replace(made.generate(prompts(count)), exact=exact)


def off_by(rollout: Rollout, gap: float, places: slice) -> Rollout:
    """The sampler's log-probs, too low by `gap` at the actions in `places`."""
    assert rollout.logprobs is not None
    logprobs = rollout.logprobs.clone()
    logprobs[places] -= gap
    return replace(rollout, logprobs=logprobs)


@pytest.mark.parametrize("exact", [False, True], ids=["scored", "first minibatch"])
def test_one_corrupted_response_among_many_stops_the_run(exact: bool) -> None:
    """The mean over all tokens is a tenth of what is allowed."""
    made = engine(rollout=LONG)
    before = weights(made.policy)
    rollout = sampled(made, exact=exact)
    corrupted = off_by(rollout, 0.025, slice(16 * 100, 16 * 101))
    with pytest.raises(RolloutError, match=r"0\.025 in the worst response, .*legal: 0\.001, and 0\.01 in one response"):
        made.update(made.score(corrupted, SCORES_OF_MANY))
    assert equal_weights(before, weights(made.policy))
    everywhere = off_by(rollout, 0.025 / MANY, slice(None))
    metrics = made.update(made.score(everywhere, SCORES_OF_MANY))
    assert metrics["rollout/logprob_gap_mean"] == pytest.approx(0.025 / MANY, rel=0.05)


def test_one_response_that_is_a_little_off_is_corrected() -> None:
    made = engine(rollout=LONG)
    corrupted = off_by(sampled(made, exact=False), 4e-3, slice(160, 176))
    experience = made.score(corrupted, SCORES_OF_MANY)
    assert experience.metrics["rollout/logprob_gap_mean"] < 1e-4 and experience.is_weights is not None
    assert experience.metrics["rollout/logprob_gap_response"] == pytest.approx(4e-3, rel=1e-2)
    expected = torch.zeros_like(experience.is_weights)
    expected[160:176] = 4e-3
    torch.testing.assert_close(experience.is_weights, expected.exp(), atol=2e-5, rtol=0)


def test_the_factor_of_one_response_is_the_config_s() -> None:
    made = engine(rollout=LONG | {"gap_response_factor": 30.0})
    corrupted = off_by(sampled(made, exact=False), 0.025, slice(0, 16))
    assert made.score(corrupted, SCORES_OF_MANY).is_weights is not None
    with pytest.raises(ValueError, match=r"rollout.gap_response_factor must be > 0"):
        engine(rollout={"gap_response_factor": 0.0})


def test_a_short_response_counts_as_one_of_sixteen_tokens() -> None:
    """One token may round far in half precision; alone in its response it is no corrupted one."""
    made = engine(rollout={"max_new_tokens": 1})
    rollout = sampled(made, exact=False)
    metrics = made.score(off_by(rollout, 0.1, slice(0, 1)), SCORES_OF_MANY).metrics
    assert metrics["rollout/logprob_gap_response"] == pytest.approx(0.1 / 16, rel=1e-2)
    with pytest.raises(RolloutError, match="in the worst response"):
        made.score(off_by(rollout, 0.2, slice(0, 1)), SCORES_OF_MANY)


def test_log_probs_are_computed_for_the_probe_only_where_a_token_is_far_off(monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = engine(rollout=LONG, ppo={"kl_coef": 0.0}), []
    logprobs = made._logprobs
    monkeypatch.setattr(made, "_logprobs", lambda *args: asked.append(1) or logprobs(*args))
    made.update(made.score(sampled(made, exact=True), SCORES_OF_MANY))
    assert not asked
    made.update(made.score(off_by(sampled(made, exact=True), 0.05, slice(5, 6)), SCORES_OF_MANY))
    assert len(asked) == 1  # and one token of 0.05 among 16 is no corrupted response


def test_a_gap_is_corrected_where_one_step_would_do_without_log_probs() -> None:
    """Nothing else asks for the policy's log-probs before a single step, but the weights do."""
    found = []
    for old in ("auto", "recompute"):
        made = engine(ppo={"kl_coef": 0.0}, rollout={"old_logprobs": old})
        experience = made.score(off_by(sampled(made, exact=False, count=8), 5e-4, slice(None)), SCORES)
        assert experience.is_weights is not None
        torch.testing.assert_close(experience.is_weights, torch.full((64,), 5e-4).exp(), atol=2e-5, rtol=0)
        assert made.update(experience)["val/ratio_max_first"] == 1.0
        found.append(weights(made.policy))
    assert equal_weights(*found)


def test_a_gap_is_part_of_the_ratio_where_the_sampler_s_log_probs_are_asked_for() -> None:
    """And nothing is computed: no forward, no weights."""
    made = engine(ppo={"kl_coef": 0.0}, rollout={"old_logprobs": "sampler"})
    rollout = off_by(sampled(made, exact=False, count=8), 5e-4, slice(None))
    experience = made.score(rollout, SCORES)
    assert experience.logprobs is rollout.logprobs and experience.is_weights is None
    assert made.update(experience)["val/ratio_max_first"] == pytest.approx(1 + 5e-4, abs=2e-5)
