"""Log-probs are of the sampled token under the sampled distribution; the KL penalty pulls towards the reference."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import tiny
from batches import (
    SCORES,
    bfloat16,
    engine,
    equal_weights,
    prompts,
    trajectories,
    weights,
)
from fastppo import Rollout, Sampling
from fastppo.score import action_logprobs
from texts import word_tokenizer


def plain_logprobs(architecture: str, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """Brute force: one forward of the untouched transformers model per action, on the tokens before it."""
    model = tiny.raw_lm(architecture).eval()
    model.set_attn_implementation("eager")
    out = []
    with torch.no_grad():
        for prompt, response in rollout.sequences():
            for t, token in enumerate(response):
                logits = model(input_ids=torch.tensor([prompt + response[:t]])).logits[0, -1]
                out.append(torch.log_softmax(logits / temperature, dim=-1)[token])
    return torch.stack(out)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_log_prob_is_of_the_token_given_its_prefix(architecture: str, temperature: float) -> None:
    """CORRECTNESS A1."""
    rollout = trajectories()
    made = action_logprobs(tiny.policy(architecture), rollout, temperature=temperature, max_tokens=40)
    torch.testing.assert_close(made, plain_logprobs(architecture, rollout, temperature), atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_scored_log_prob_is_the_sampler_s(architecture: str, temperature: float) -> None:
    """CORRECTNESS A2, and what the sampler drew from is the model's softmax at that temperature."""
    made = engine(tiny.policy(architecture), rollout={"temperature": temperature, "old_logprobs": "recompute"})
    rollout = made.generate(prompts())
    assert rollout.logprobs is not None
    experience = made.score(rollout, SCORES)
    torch.testing.assert_close(experience.logprobs, rollout.logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(rollout.logprobs, plain_logprobs(architecture, rollout, temperature), atol=1e-5, rtol=0)


@pytest.mark.parametrize("sampling", [{"top_p": 0.9}, {"top_k": 5}, {"temperature": 0.6}], ids=str)
def test_another_distribution_than_the_trained_one_is_refused(sampling: dict[str, float]) -> None:
    """CORRECTNESS A3."""
    made = engine()
    rollout = made.generate(prompts(), Sampling(**{"temperature": 1.0, "max_new_tokens": 4, **sampling}))  # pyright: ignore
    with pytest.raises(ValueError, match="temperature|top_p"):
        made.score(rollout, SCORES)


def test_everything_but_the_weights_is_float32_with_a_bfloat16_policy() -> None:
    """CORRECTNESS A6."""
    made = engine(bfloat16(tiny.policy()), ppo={"num_epochs": 2})
    experience = made.score(made.generate(prompts()), SCORES)
    for name in ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns"):
        assert getattr(experience, name).dtype == torch.float32, name
    assert made.policy.dtype == torch.bfloat16


def test_bfloat16_noise_of_the_ratio_is_small() -> None:
    """CORRECTNESS A6: sampler against trainer, where log-probs in bfloat16 would give 0.05."""
    made = engine(bfloat16(tiny.policy()), rollout={"max_new_tokens": 16})
    rollout = made.generate(prompts(64))
    experience = made.score(rollout, [0.0] * 64)
    assert experience.logprobs is not None and rollout.logprobs is not None
    ratio = (experience.logprobs - rollout.logprobs).exp()
    assert 0 < float(ratio.std()) <= 0.02


def test_the_reported_kl_is_the_one_in_the_reward() -> None:
    """CORRECTNESS A9."""
    made = engine(tiny.policy(seed=1), reference=tiny.policy(seed=2), ppo={"kl_coef": 0.3})
    metrics = made.score(trajectories(), SCORES).metrics
    assert abs(metrics["objective/kl"]) > 0.1
    expected = metrics["objective/scores_shaped"] - 0.3 * metrics["objective/kl"]
    assert metrics["objective/rlhf_reward"] == pytest.approx(expected, rel=1e-5)


def test_what_the_policy_likes_more_than_the_reference_costs_reward() -> None:
    """CORRECTNESS A10, sign in the reward: r_t = -kl_coef * (log pi - log ref), token by token."""
    made = engine(tiny.policy(seed=1), reference=tiny.policy(seed=2), ppo={"kl_coef": 0.3, "num_epochs": 2})
    experience = made.score(trajectories(), [0.0] * 8)
    assert experience.logprobs is not None and experience.ref_logprobs is not None
    expected = -0.3 * (experience.logprobs - experience.ref_logprobs)
    torch.testing.assert_close(experience.rewards, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("estimator", ["k2", "k3", "k1+", "k3+"])
def test_the_kl_loss_alone_pulls_the_policy_to_the_reference(estimator: str) -> None:
    """CORRECTNESS A10, sign in the loss: without advantages, every step lowers the KL of fresh samples."""
    made = engine(
        tiny.policy(seed=1, scale=2.0),
        reference=tiny.policy(seed=2, scale=2.0),
        ppo={"kl_coef": 1.0, "kl_in": "loss", "kl_estimator": estimator, "advantage": "reinforce++"},
        rollout={"old_logprobs": "recompute"},
        optimizer={"lr": 3e-3},
    )
    kl = []
    for step in range(8):
        experience = made.score(made.generate(prompts(64, seed=step)), [0.0] * 64)
        still = replace(experience, advantages=torch.zeros_like(experience.advantages))
        kl.append(made.update(still)["objective/kl"])
    assert sum(kl[-3:]) < 0.6 * sum(kl[:3]), kl


@pytest.mark.parametrize("shown", [True, False], ids=["tokenizer", "no tokenizer"])
def test_the_ids_that_were_given_are_trained_on(shown: bool) -> None:
    """CORRECTNESS A13: [he][llo] and [hello] are one text and two trajectories."""
    he, llo, hello = 5, 6, 7
    tokenizer = word_tokenizer(["<pad>", "<eos>", "a", "b", "c", "he", "llo", "hello"])
    assert tokenizer.decode([he, llo]) == tokenizer.decode([hello]) == "hello"

    def trained(response: list[int]) -> dict[str, Tensor]:
        made = engine(tokenizer=tokenizer if shown else None, ppo={"whiten_advantages": False})
        made.update(made.score(Rollout.pack([[1, 2]], [response]), [1.0]))
        return weights(made.policy)

    split = trained([he, llo])
    assert not equal_weights(split, trained([hello]))


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_sampler_follows_every_update(architecture: str) -> None:
    """CORRECTNESS A14: after a step the sampler draws from the new weights and says so."""
    made = engine(tiny.policy(architecture), rollout={"old_logprobs": "recompute"}, optimizer={"lr": 1e-2})
    rollout = made.generate(prompts())
    before = made.score(rollout, SCORES)
    made.update(before)
    fresh = made.generate(prompts())
    assert fresh.policy_version == made.version == 1
    after = made.score(fresh, SCORES)
    torch.testing.assert_close(after.logprobs, fresh.logprobs, atol=1e-5, rtol=0)
    again = made.score(rollout, SCORES)
    assert again.logprobs is not None and before.logprobs is not None
    assert float((again.logprobs - before.logprobs).abs().mean()) > 1e-3  # the weights did move
