"""Decode steps of fixed shapes, as CUDA graphs replay them, and the memory that is kept from call to call."""

import pytest
import torch

from batches import prompts
from fastppo import Sampling
from fastppo.rollout import decoder, graphs
from fastppo.score import action_logprobs
from test_rollout import responses, sampler


@pytest.mark.parametrize("keep_memory", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_steps_of_fixed_shapes_draw_the_same(
    architecture: str, keep_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a CUDA graph replays: rows that stand still beside the live ones, and all of memory."""
    given, sampling = prompts(20), Sampling(max_new_tokens=12, seed=3, samples_per_prompt=2, stop_sequences=((5, 6),))
    expected = sampler(architecture).generate(given, sampling)
    made = sampler(architecture, max_rows=7, keep_memory=keep_memory)
    advance, counts = decoder.Decoder._advance, set[int]()
    monkeypatch.setattr(decoder.Steps, "__call__", lambda steps, *key: counts.add(key[0]) or steps.step(*key))
    monkeypatch.setattr(decoder.Decoder, "fixed_shapes", property(lambda _: True, lambda *_: None), raising=False)
    for _ in range(2):
        again = made.generate(given, sampling)
        assert responses(again) == responses(expected)
        torch.testing.assert_close(again.logprobs, expected.logprobs, atol=1e-5, rtol=0)
        assert again.finish_reasons == expected.finish_reasons
    assert decoder.Decoder._advance is advance and counts <= {1, 2, 3, 4, 6, 7}


def test_kept_memory_grows_and_serves_other_samplings() -> None:
    kept, fresh = sampler(keep_memory=True), sampler()
    for count, sampling in (
        (3, Sampling(seed=1, max_new_tokens=5)),
        (9, Sampling(seed=2, max_new_tokens=20, temperature=0.5)),
        (4, Sampling(seed=1, max_new_tokens=5, top_k=1)),
        (9, Sampling(seed=2, max_new_tokens=20, temperature=0.5, stop_token_ids=(7,))),
    ):
        one, other = (made.generate(prompts(count), sampling) for made in (kept, fresh))
        assert responses(one) == responses(other) and one.finish_reasons == other.finish_reasons
    assert kept._kept is not None and fresh._kept is None


def test_kept_memory_is_left_when_the_policy_has_moved() -> None:
    """A recorded step would read the weights where they were."""
    made = sampler(keep_memory=True)
    expected = responses(made.generate(prompts(8), Sampling(seed=1)))
    kept = made._kept
    assert responses(made.generate(prompts(8), Sampling(seed=1))) == expected and made._kept is kept
    made.policy.lm_head.weight.data = made.policy.lm_head.weight.data.clone()
    assert responses(made.generate(prompts(8), Sampling(seed=1))) == expected
    assert made._kept is not None and made._kept is not kept


def test_kept_memory_holds_nothing_of_the_old_weights() -> None:
    made = sampler(keep_memory=True)
    made.generate(prompts(8), Sampling(seed=1))
    with torch.no_grad():
        for parameter in made.policy.parameters():
            parameter.mul_(1.1)
    rollout = made.generate(prompts(8), Sampling(seed=1))
    ours = action_logprobs(made.policy, rollout, temperature=1.0, max_tokens=4096)
    torch.testing.assert_close(rollout.logprobs, ours, atol=1e-5, rtol=0)


def test_a_recording_that_ran_out_of_memory_is_known_as_such() -> None:
    """Also where its end raises another error; the rollout is then redone with fewer rows."""
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
    except RuntimeError as error:
        assert isinstance(graphs._out_of_memory(error), torch.OutOfMemoryError)
    assert graphs._out_of_memory(RuntimeError("operation not permitted when stream is capturing")) is None


@pytest.mark.parametrize("rows", [1, 5, 48, 500])
def test_a_bucket_holds_the_live_rows_and_at_most_half_as_many_again(rows: int) -> None:
    for live in range(1, rows + 1):
        count = graphs.bucket(live, rows)
        assert live <= count <= min(rows, max(live + 1, live * 3 // 2))
    assert len({graphs.bucket(live, rows) for live in range(1, rows + 1)}) <= 2 * rows.bit_length() + 1
