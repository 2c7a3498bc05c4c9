"""What the update does with log-probs that are not the policy's own, and settings that would do nothing."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import tiny
from batches import SCORES, engine, equal_weights, prompts, trajectories, weights
from fastppo import PPOConfig, PPOEngine, Rollout, RolloutConfig, Sampling, WeightedRewards, models
from fastppo.config import ModelConfig
from fastppo.rewards import FunctionReward


def sampled(made: PPOEngine, gap: float, *, exact: bool = True) -> Rollout:
    rollout = made.generate(prompts())
    assert rollout.logprobs is not None
    return replace(rollout, logprobs=rollout.logprobs - gap, exact=exact)


def test_the_sampler_s_gap_is_measured_in_the_first_minibatch() -> None:
    """CORRECTNESS P6: also when the sampler's log-probs stand for the policy's and nothing is recomputed."""
    made = engine()
    metrics = made.update(made.score(sampled(made, 0.0), SCORES))
    assert 0 < metrics["rollout/logprob_gap_max"] < 1e-5
    metrics = made.update(made.score(sampled(made, 5e-4), SCORES))
    assert metrics["rollout/logprob_gap_mean"] == pytest.approx(5e-4, rel=1e-2)


def test_a_sampler_that_disagrees_with_its_own_module_stops_the_run() -> None:
    made = engine()
    before = weights(made.policy)
    experience = made.score(sampled(made, 0.5), SCORES)
    with pytest.raises(RuntimeError, match=r"are 0\.5 nats a token off the trainer's \(largest gap 0\.5\)"):
        made.update(experience)
    assert equal_weights(before, weights(made.policy))


def test_log_probs_of_another_engine_start_off_ratio_one() -> None:
    """CORRECTNESS A12, bypass: pi_old is the sampler, so the first ratio is exp(gap), not 1 by definition."""
    made = engine(rollout={"old_logprobs": "sampler", "gap_stop": 1.0})
    metrics = made.update(made.score(sampled(made, 0.1, exact=False), SCORES))
    assert metrics["val/ratio_max_first"] == pytest.approx(torch.tensor(0.1).exp().item(), rel=1e-4)


def test_a_cut_response_with_token_scores_earns_exactly_the_penalty() -> None:
    """CORRECTNESS B4."""
    made = engine(ppo={"truncation": "penalty", "missing_eos_score": -1.0, "kl_coef": 0.0})
    rollout = Rollout.pack([[1], [2]], [[3, 4], [5, 6]], finish_reasons=["length", "stop"])
    experience = made.score(rollout, [[5.0, 5.0], [5.0, 5.0]])
    assert experience.rewards.tolist() == [0.0, -1.0, 5.0, 5.0]


def test_an_empty_response_beside_as_many_actions_as_sequences() -> None:
    """CORRECTNESS B11: one score per sequence stays one per sequence."""
    experience = engine(ppo={"kl_coef": 0.0}).score(Rollout.pack([[1], [2]], [[], [3, 4]]), [9.0, 2.0])
    assert experience.rewards.tolist() == [0.0, 2.0]


def test_a_minibatch_without_a_trained_action_moves_nothing() -> None:
    made = engine(ppo={"truncation": "mask"})
    made.update(made.score(trajectories(), SCORES))  # fills Adam's momentum
    before = weights(made.policy)
    made.update(made.score(trajectories(finish_reasons=["length"] * 8), SCORES))
    assert equal_weights(before, weights(made.policy))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_target": 6.0, "kl_coef": 0.0}, "multiplies ppo.kl_coef, which must be > 0"),
        ({"target_kl": 0.1, "num_epochs": 1}, "needs at least two"),
        ({"objective": "kl-penalty", "num_epochs": 1}, "takes at least two steps"),
        ({"critic_warmup_steps": 2, "advantage": "rloo"}, "needs a critic"),
        ({"loss_divisor": 10}, "only acts with ppo.aggregation = 'constant'"),
        ({"gamma": 0.9, "advantage": "grpo"}, "only acts with ppo.advantage"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPOConfig(**settings)


def test_scores_of_a_rollout_stay_on_its_device() -> None:
    """A fake CUDA device: nothing is computed, but tensors of two devices do not mix."""
    rewards = WeightedRewards([FunctionReward(lambda s: [1.0] * len(s), name="one")])
    rollout = trajectories()
    with FakeTensorMode(allow_non_fake_inputs=True):
        device = torch.empty(1, device="cuda").device
        moved = rollout.to(device)
        assert moved.input_ids.device == device and moved.cu_seqlens.device == device
    assert {part.device for part in rewards(rollout).parts.values()} == {rollout.input_ids.device}


def test_dropout_that_a_module_copied_from_its_config_is_off() -> None:
    raw = tiny.raw_lm("llama")
    for module in raw.modules():
        if hasattr(module, "attention_dropout"):
            vars(module)["attention_dropout"] = 0.5
    policy = models.prepare_policy(raw)
    copied = [m.attention_dropout for m in policy.modules() if hasattr(m, "attention_dropout")]
    assert copied and not any(copied)


def test_a_critic_where_transformers_has_no_token_classifier(tmp_path) -> None:
    """Olmo2 has a sequence classifier only: same body, same head, and it survives saving."""
    from transformers import Olmo2Config

    config = Olmo2Config(**{**tiny.CONFIGS["llama"]().to_dict(), "model_type": "olmo2"})
    policy = models.prepare_policy(models.new_causal_lm(config))
    made = PPOEngine(policy, rollout=RolloutConfig(num_prompts=8, max_new_tokens=4, temperature=1.0))
    rollout = made.generate(prompts(), Sampling(max_new_tokens=4))
    made.update(made.score(rollout, SCORES))
    made.save(tmp_path)
    again = models.load_critic(str(tmp_path / "critic"))
    assert equal_weights(weights(made.critic), weights(again))
    assert models.load_policy(ModelConfig(path=str(tmp_path / "policy"))).dtype == torch.float32


def test_a_foreign_sequence_beyond_the_context_is_refused() -> None:
    made = engine()
    with pytest.raises(ValueError, match=r"a sequence has 130 tokens, more than the policy's context of 128"):
        made.score(Rollout.pack([[1] * 100], [[2] * 30]), [1.0])
