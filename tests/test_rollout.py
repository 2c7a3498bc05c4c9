"""The embedded engine: repeatable, tidy, and its log-probs are the trainer's."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, MistralConfig

import tiny
from batches import engine, prompts
from fastppo import Prompts, Rollout, Sampling, models
from fastppo.attention import PACKED
from fastppo.checks import RolloutError
from fastppo.data import select
from fastppo.models.activations import keep_activations
from fastppo.rollout import EmbeddedEngine, decoder
from fastppo.score import action_logprobs

ENDS = (3, 17, 30, 31, 38)


def sampler(architecture: str = "llama", **kwargs: Any) -> EmbeddedEngine:
    return EmbeddedEngine(tiny.policy(architecture), **{"eos_token_ids": ENDS, "seed": 5, **kwargs})


def responses(rollout: Rollout) -> list[list[int]]:
    return [response for _, response in rollout.sequences()]


def test_the_seed_fixes_what_is_drawn() -> None:
    one, same, other = (sampler(seed=s).generate(prompts(16), Sampling()) for s in (5, 5, 6))
    assert responses(one) == responses(same) != responses(other)
    assert one.logprobs is not None and same.logprobs is not None and torch.equal(one.logprobs, same.logprobs)


def test_two_calls_draw_differently() -> None:
    made = sampler()
    assert responses(made.generate(prompts(16), Sampling())) != responses(made.generate(prompts(16), Sampling()))


def test_the_global_generator_is_not_touched() -> None:
    made, before = sampler(), torch.get_rng_state()
    before = torch.get_rng_state()
    made.generate(prompts(), Sampling())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("training", [True, False])
def test_the_policy_is_left_as_found(training: bool) -> None:
    made = sampler()
    made.policy.train(training)
    made.generate(prompts(), Sampling())
    assert all(m.training == training for m in made.policy.modules())
    assert made.policy.config._attn_implementation == PACKED


def test_modes_that_were_mixed_are_mixed_again() -> None:
    """A part that is frozen in eval mode stays so, and one in eval mode may hold one that trains."""
    made = sampler()
    made.policy.train()
    body: Any = made.policy.base_model
    body.layers[0].eval()
    body.layers[1].eval()
    body.layers[1].mlp.train()
    found = [m.training for m in made.policy.modules()]
    during: list[bool] = []
    hook = body.layers[1].mlp.register_forward_hook(lambda m, args, out: during.append(m.training))
    made.generate(prompts(), Sampling())
    hook.remove()
    assert [m.training for m in made.policy.modules()] == found and {True, False} == {*found}
    assert during and not any(during)


def test_a_failure_leaves_the_policy_as_found() -> None:
    made = sampler()
    with pytest.raises(IndexError):
        made.generate(Prompts(token_ids=((tiny.VOCAB + 5,),)), Sampling())
    assert made.policy.training and made.policy.config._attn_implementation == PACKED


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_log_probs_are_the_trainers(architecture: str, checkpointing: bool) -> None:
    """And a plain forward's: with 40 requests in 12 rows, of many lengths, longer than the sliding window."""
    made = sampler(architecture, max_rows=12)
    if checkpointing:
        keep_activations(made.policy, tiny.LAYERS[True])
    given = prompts(20, longest=30)
    rollout = made.generate(given, Sampling(temperature=0.8, max_new_tokens=20, samples_per_prompt=2))
    ours = action_logprobs(made.policy, rollout, temperature=0.8, max_tokens=200)
    assert rollout.exact
    torch.testing.assert_close(rollout.logprobs, ours, atol=1e-5, rtol=0)
    plain = plain_logprobs(tiny.raw_lm(architecture), rollout, 0.8)
    torch.testing.assert_close(rollout.logprobs, plain, atol=1e-5, rtol=0)
    assert len({len(r) for r in responses(rollout)}) > 3  # rows did end at different times


@torch.no_grad()
def plain_logprobs(model: Any, rollout: Rollout, temperature: float) -> torch.Tensor:
    """From transformers' own forward and attention, a sequence at a time."""
    out: list[torch.Tensor] = []
    model.eval().set_attn_implementation("eager")
    for prompt, response in rollout.sequences():
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        out.append((logits / temperature).log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(out)


def test_finish_reason_says_how_it_ended() -> None:
    rollout = sampler().generate(prompts(64), Sampling(max_new_tokens=10))
    for response, reason in zip(responses(rollout), rollout.finish_reasons, strict=True):
        assert reason == ("stop" if response[-1] in ENDS else "length")
        assert reason == "stop" or len(response) == 10
        assert not {*response[:-1]} & {*ENDS}
    assert {*rollout.finish_reasons} == {"stop", "length"}


def test_an_end_at_the_very_limit_is_a_stop() -> None:
    made = sampler(eos_token_ids=range(tiny.VOCAB))
    rollout = made.generate(prompts(), Sampling(max_new_tokens=1))
    assert {*rollout.finish_reasons} == {"stop"}


def test_samples_of_a_prompt_stand_together_in_order() -> None:
    given = Prompts(token_ids=((1, 2), (3,), (4, 5, 6)), records=tuple({"n": i} for i in range(3)))
    rollout = sampler(max_rows=4).generate(given, Sampling(samples_per_prompt=3))
    assert rollout.group_ids.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [tuple(p) for p, _ in rollout.sequences()] == [p for p in given.token_ids for _ in range(3)]
    assert [r["n"] for r in rollout.records] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len({tuple(r) for r in responses(rollout)}) > 3


@pytest.mark.parametrize("max_rows", [1, 3, 8, 100])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_greedy_responses_do_not_depend_on_who_is_beside_them(architecture: str, max_rows: int) -> None:
    given = prompts(17)
    together = sampler(architecture, max_rows=max_rows).generate(given, Sampling(top_k=1, max_new_tokens=12))
    model = tiny.raw_lm(architecture).eval()
    model.set_attn_implementation("eager")
    for (prompt, response), _ in zip(together.sequences()[:6], range(6), strict=True):
        ids = list(prompt)
        for token in response:
            with torch.no_grad():
                assert int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)
    alone = sampler(architecture).generate(given, Sampling(top_k=1, max_new_tokens=12))
    assert responses(together) == responses(alone)


@pytest.mark.parametrize("sampling", [{"top_k": 3}, {"top_p": 0.2}], ids=str)
def test_truncated_sampling_draws_from_the_top_only(sampling: dict[str, Any]) -> None:
    made = sampler(eos_token_ids=())
    rollout = made.generate(Prompts(token_ids=((1, 2),) * 200), Sampling(max_new_tokens=1, **sampling))
    logprobs = action_logprobs(
        made.policy, Rollout.pack([[1, 2]] * 48, [[t] for t in range(48)]), temperature=1.0, max_tokens=1000
    )
    ranked = logprobs.argsort(descending=True)
    mass = logprobs[ranked].exp().cumsum(0)
    size = sampling.get("top_k") or int((mass < 0.2).sum()) + 1
    drawn = {response[0] for response in responses(rollout)}
    assert drawn == {*ranked[:size].tolist()}


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_frequencies_are_the_policy_s_probabilities(temperature: float) -> None:
    made = sampler(eos_token_ids=(), max_rows=5000)
    rollout = made.generate(Prompts(token_ids=((1, 2),) * 5000), Sampling(max_new_tokens=1, temperature=temperature))
    alphabet = Rollout.pack([[1, 2]] * 48, [[t] for t in range(48)])
    expected = action_logprobs(made.policy, alphabet, temperature=temperature, max_tokens=1000).exp() * 5000
    counts = torch.tensor([r[0] for r in responses(rollout)]).bincount(minlength=48)
    assert float(((counts - expected).square() / expected).sum()) < 83  # chi-square, 47 degrees of freedom, p = 0.001


def test_context_overflow_is_refused_with_numbers() -> None:
    with pytest.raises(ValueError, match=r"prompt of 100 tokens plus max_new_tokens = 53 exceeds .* context of\s+128"):
        sampler().generate(Prompts(token_ids=((1,) * 100,)), Sampling())


def test_a_context_that_is_just_full_is_sampled() -> None:
    rollout = sampler("gpt2", eos_token_ids=()).generate(Prompts(token_ids=((1,) * 100,)), Sampling(max_new_tokens=28))
    assert len(responses(rollout)[0]) == 28


def test_weights_of_another_module_are_refused() -> None:
    with pytest.raises(ValueError, match="built on"):
        sampler().sync_weights(tiny.policy(), 1)


def test_a_seeded_draw_repeats_and_leaves_the_engine_s_generator_alone() -> None:
    made = sampler()
    state = made.generator.get_state()
    one, same, other = (made.generate(prompts(16), Sampling(seed=s)) for s in (5, 5, 6))
    assert responses(one) == responses(same) != responses(other)
    assert torch.equal(state, made.generator.get_state())


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_rows_and_order_change_nothing_that_is_drawn(architecture: str) -> None:
    """A request's numbers follow from the seed and its prompt, wherever and beside whomever it runs."""
    given, sampling = prompts(20), Sampling(max_new_tokens=12, seed=3)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist()
    made = responses(sampler(architecture).generate(given, sampling))
    for max_rows in (1, 7):
        narrow = sampler(architecture, max_rows=max_rows)
        assert responses(narrow.generate(given, sampling)) == made
        assert responses(narrow.generate(select(given, order), sampling)) == [made[i] for i in order]


def test_a_prompt_that_occurs_twice_is_answered_twice() -> None:
    twice = responses(sampler().generate(Prompts(token_ids=((1, 2), (1, 2))), Sampling(seed=3)))
    samples = responses(sampler().generate(Prompts(token_ids=((1, 2),)), Sampling(seed=3, samples_per_prompt=2)))
    assert twice == samples and twice[0] != twice[1]


def test_each_prompt_has_its_own_limit() -> None:
    limits = tuple(1 + i % 9 for i in range(17))
    given = replace(prompts(17), limits=limits)
    rollout = sampler(eos_token_ids=(), max_rows=4).generate(given, Sampling(max_new_tokens=50, samples_per_prompt=2))
    assert [len(r) for r in responses(rollout)] == [limit for limit in limits for _ in range(2)]
    assert {*rollout.finish_reasons} == {"length"}
    ours = action_logprobs(tiny.policy(), rollout, temperature=1.0, max_tokens=200)
    torch.testing.assert_close(rollout.logprobs, ours, atol=1e-5, rtol=0)


def test_a_stop_sequence_ends_a_response_as_a_whole_only() -> None:
    free = sampler(eos_token_ids=()).generate(prompts(40), Sampling(max_new_tokens=20, seed=3))
    stops = tuple(tuple(r[4:6]) for r in responses(free)[:10])
    sampling = Sampling(max_new_tokens=20, seed=3, stop_sequences=stops)
    rollout = sampler(eos_token_ids=()).generate(prompts(40), sampling)
    for long, made, reason in zip(responses(free), responses(rollout), rollout.finish_reasons, strict=True):
        ends = [i + 2 for i in range(len(long) - 1) if tuple(long[i : i + 2]) in stops]
        assert made == long[: min([*ends, 20])] and reason == ("stop" if ends else "length")
    assert rollout.finish_reasons.count("stop") >= 10


def test_memory_bounds_the_rows_and_no_result() -> None:
    given, sampling = prompts(9), Sampling(max_new_tokens=12, seed=3)
    row = 32 * models.kv_bytes_per_token(tiny.policy())
    assert row == 32 * 2 * 2 * 2 * 8 * 4  # positions, layers, keys and values, heads, D, bytes
    narrow = sampler(kv_bytes=2 * row)
    seen: list[int] = []
    hook = narrow.policy.get_input_embeddings().register_forward_hook(lambda m, args, out: seen.append(args[0].numel()))
    made = narrow.generate(given, sampling)
    hook.remove()
    assert responses(made) == responses(sampler().generate(given, sampling))
    assert seen.count(2) > 5 and max(seen[1:]) <= 2 * max(len(p) for p in given.token_ids)
    with pytest.raises(
        ValueError, match=r"one sequence of 32 tokens take .* GiB, more than the .* raise rollout.kv_gib"
    ):
        sampler(kv_bytes=row - 1).generate(given, sampling)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # the second with a tied head
def test_tokens_come_from_the_weights_as_they_are_now(architecture: str) -> None:
    """No key or value outlives a call, and no copy of a head."""
    made = sampler(architecture)
    made.generate(prompts(), Sampling(seed=3))
    with torch.no_grad():
        for p in made.policy.parameters():
            p.mul_(0.9)
    fresh = EmbeddedEngine(copy.deepcopy(made.policy), eos_token_ids=ENDS)
    rollout = made.generate(prompts(), Sampling(seed=3))
    assert responses(rollout) == responses(fresh.generate(prompts(), Sampling(seed=3)))
    ours = action_logprobs(made.policy, rollout, temperature=1.0, max_tokens=200)
    torch.testing.assert_close(rollout.logprobs, ours, atol=1e-5, rtol=0)
    unprepared = tiny.raw_lm(architecture)
    unprepared.load_state_dict(made.policy.state_dict())
    torch.testing.assert_close(rollout.logprobs, plain_logprobs(unprepared, rollout, 1.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**tiny._SHAPE, sliding_window=4),
        Gemma3TextConfig(
            **tiny._SHAPE, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
        ),
    ],
    ids=["mistral", "gemma3"],
)
def test_other_architectures_are_sampled_as_they_are_trained(config: Any) -> None:
    torch.manual_seed(0)
    policy = models.prepare_policy(models.new_causal_lm(config))
    rollout = EmbeddedEngine(policy, max_rows=5).generate(prompts(12), Sampling(max_new_tokens=15))
    ours = action_logprobs(policy, rollout, temperature=1.0, max_tokens=200)
    torch.testing.assert_close(rollout.logprobs, ours, atol=1e-5, rtol=0)


def test_a_prefill_is_cut_at_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    given, sampling = prompts(12), Sampling(max_new_tokens=6, seed=3, samples_per_prompt=2)
    whole = responses(sampler().generate(given, sampling))
    monkeypatch.setattr(decoder, "PREFILL_TOKENS", 10)
    assert responses(sampler().generate(given, sampling)) == whole


def test_a_request_that_an_engine_drops_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine()
    whole = made.rollout_engine.generate
    drops = lambda given, sampling: whole(select(given, range(1, len(given))), sampling)  # noqa: E731
    monkeypatch.setattr(made.rollout_engine, "generate", drops)
    with pytest.raises(RolloutError, match="answered 7 of 8 requests: none may be dropped"):
        made.generate(prompts(8))
