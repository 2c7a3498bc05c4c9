"""Where responses end and what a cut one earns: from lengths and finish reasons, never from token ids."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import tiny
from batches import (
    SCORES,
    engine,
    equal_weights,
    largest_gap,
    prompts,
    trajectories,
    weights,
    with_random_head,
)
from fastppo import PPOEngine, Prompts, Rollout, models
from texts import word_tokenizer

EOS = 7
CUT = ("stop", "length") * 4
PLAIN: dict[str, Any] = {"kl_coef": 0.0, "whiten_advantages": False}


def some_ends() -> tuple[int, ...]:
    """Two tokens that the tiny policy soon samples."""
    rollout = engine().generate(prompts(32))
    counts = rollout.input_ids[rollout.loss_mask].bincount(minlength=tiny.VOCAB)
    first, second = counts.argsort(descending=True)[:2].tolist()
    return first, second


@pytest.mark.parametrize("pad", [0, EOS], ids=["another token", "the end token"])
def test_what_the_pad_token_is_changes_nothing(pad: int) -> None:
    """CORRECTNESS B1: whole iterations, bit for bit, against a policy that knows of no padding."""

    def run(pad_token: int | None) -> tuple[dict[str, Tensor], list[list[int]]]:
        policy = tiny.policy()
        policy.config.eos_token_id = EOS
        if pad_token is not None:
            policy.config.pad_token_id = pad_token
            policy = new_with_weights(policy)
        words = [f"w{i}" for i in range(tiny.VOCAB)]
        tokenizer = word_tokenizer(words, pad=words[pad_token or 0], eos=words[EOS])
        made = engine(policy, tokenizer=tokenizer, ppo={"num_epochs": 2})
        responses = []
        for step in range(3):
            batch = Prompts(token_ids=tuple((*p, EOS, 0) for p in prompts(seed=step).token_ids))  # both ids, in use
            rollout = made.generate(batch)
            responses += [response for _, response in rollout.sequences()]
            made.update(made.score(rollout, SCORES))
        return weights(made.policy), responses

    ours, plain = run(pad), run(None)
    assert equal_weights(ours[0], plain[0]) and ours[1] == plain[1]
    assert any(response[-1] == EOS for response in ours[1])


def new_with_weights(policy: PreTrainedModel) -> PreTrainedModel:
    """Made from the config, as loading a checkpoint does: transformers tells the embedding about padding."""
    made = AutoModelForCausalLM.from_config(policy.config)
    made.load_state_dict(policy.state_dict())
    return models.prepare_policy(made)


def test_every_end_token_of_the_generation_config_ends_a_response() -> None:
    """CORRECTNESS B2: the end token stays, as the last one."""
    ends, policy = some_ends(), tiny.policy()
    policy.generation_config.eos_token_id = list(ends)
    assert_ended_by(engine(policy, ppo=PLAIN), ends)


def test_a_custom_stop_token_is_an_end() -> None:
    """CORRECTNESS B3: not a response that was cut."""
    ends = some_ends()
    assert_ended_by(engine(rollout={"stop_token_ids": ends}, ppo=PLAIN), ends)


def assert_ended_by(made: PPOEngine, ends: tuple[int, ...]) -> None:
    rollout = made.generate(prompts(64))
    ended_by = set()
    for (_, response), reason in zip(rollout.sequences(), rollout.finish_reasons, strict=True):
        assert not {*ends} & {*response[:-1]}
        assert (reason == "stop") == (response[-1] in ends)
        assert reason == "stop" or len(response) == 8
        ended_by |= {response[-1]} & {*ends}
    assert ended_by == {*ends}
    experience = made.score(rollout, [5.0] * 64)
    last = experience.action_cu_seqlens[1:].long() - 1
    assert torch.equal(experience.rewards[last] == -1.0, rollout.truncated)  # the penalty of those that were cut


@pytest.mark.parametrize("shaping", [{}, {"clip_scores": 0.5}, {"normalize_scores": True}], ids=str)
def test_a_cut_response_earns_exactly_the_penalty(shaping: dict[str, Any]) -> None:
    """CORRECTNESS B4: whatever it scored."""
    made = engine(ppo={**PLAIN, "missing_eos_score": -1.7, **shaping})
    experience = made.score(trajectories(finish_reasons=CUT), SCORES)
    earned = per_sequence(experience.rewards, experience.action_cu_seqlens)
    cut = torch.tensor([reason == "length" for reason in CUT])
    assert torch.equal(earned[cut], torch.full((4,), -1.7))
    assert (earned[~cut] != -1.7).all()


def per_sequence(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.stack([part.sum() for part in x.tensor_split(cu_seqlens[1:-1].long())])


def test_monte_carlo_advantage_is_score_minus_value() -> None:
    """CORRECTNESS B5: gamma = lam = 1, at every action."""
    made = with_random_head(engine(ppo={**PLAIN, "lam": 1.0}))
    experience = made.score(trajectories(), SCORES)
    assert experience.values is not None
    score = torch.tensor(SCORES).repeat_interleave(experience.rollout.action_counts)
    torch.testing.assert_close(experience.advantages, score - experience.values, atol=1e-5, rtol=0)
    torch.testing.assert_close(experience.returns, score, atol=1e-5, rtol=0)


@pytest.mark.parametrize("truncation", ["none", "penalty", "bootstrap", "mask"])
def test_the_score_reaches_the_end_token_undecayed(truncation: str) -> None:
    """CORRECTNESS B5: lam < 1, V = 0, and the last action has the whole score as its advantage."""
    experience = engine(ppo={**PLAIN, "truncation": truncation}).score(trajectories(), SCORES)
    last = experience.action_cu_seqlens[1:].long() - 1
    torch.testing.assert_close(experience.advantages[last], torch.tensor(SCORES), atol=1e-6, rtol=0)
    torch.testing.assert_close(experience.advantages[last - 1][:1], torch.tensor(SCORES[:1]) * 0.95)


def test_order_of_the_sequences_permutes_the_results() -> None:
    """CORRECTNESS B7."""
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    made = with_random_head(engine(ppo={"kl_coef": 0.3}, reference=tiny.policy(seed=2)))
    pairs = trajectories().sequences()
    shuffled = Rollout.pack([pairs[i][0] for i in order], [pairs[i][1] for i in order])
    straight, mixed = made.score(trajectories(), SCORES), made.score(shuffled, [SCORES[i] for i in order])
    for name in ("logprobs", "values", "rewards", "advantages", "returns"):
        parts = getattr(straight, name).tensor_split(straight.action_cu_seqlens[1:-1].long())
        torch.testing.assert_close(getattr(mixed, name), torch.cat([parts[i] for i in order]), atol=5e-6, rtol=1e-6)


def one_cut_response(truncation: str) -> tuple[PPOEngine, Any]:
    made = with_random_head(engine(ppo={**PLAIN, "truncation": truncation, "missing_eos_score": -3.0, "lam": 1.0}))
    return made, made.score(trajectories(finish_reasons=CUT), SCORES)


def test_bootstrap_puts_the_value_of_the_last_state_after_a_cut_response() -> None:
    """CORRECTNESS B9: and after no other."""
    made, experience = one_cut_response("bootstrap")
    assert made.critic is not None
    _, last_values = made._values(made.critic, experience.rollout)
    expected = torch.tensor(SCORES) + torch.where(experience.rollout.truncated, last_values, 0.0)
    last = experience.action_cu_seqlens[1:].long() - 1
    torch.testing.assert_close(experience.returns[last], expected, atol=1e-5, rtol=0)
    assert float(last_values.abs().min()) > 1e-3


def test_mask_leaves_cut_responses_out_of_the_loss() -> None:
    """CORRECTNESS B9: the gradient is that of the others alone."""
    whole = engine(ppo={**PLAIN, "truncation": "mask"})
    kept = engine(ppo={**PLAIN, "truncation": "mask"})
    pairs = trajectories().sequences()
    alone = Rollout.pack([p for p, _ in pairs[::2]], [r for _, r in pairs[::2]])
    whole.update(whole.score(trajectories(finish_reasons=CUT), SCORES))
    kept.update(kept.score(alone, SCORES[::2]))
    assert largest_gap(weights(whole.policy), weights(kept.policy)) <= 1e-6
