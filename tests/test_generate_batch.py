"""transformers' continuous batching as a rollout engine: what it draws is the policy's, and it leaves no trace."""

import itertools
import threading
from typing import Any

import pytest
import torch
from transformers.generation.continuous_batching import offloading_manager, utils

import tiny
from batches import SCORES, engine, prompts
from fastppo import Prompts, Rollout, Sampling, models
from fastppo.attention import PACKED
from fastppo.checks import RolloutError
from fastppo.rollout import GenerateBatchEngine, generate_batch, kv
from fastppo.score import action_logprobs

ENDS = (3, 17, 30, 31, 38)


def sampler(architecture: str = "llama", **kwargs: Any) -> GenerateBatchEngine:
    return GenerateBatchEngine(tiny.policy(architecture), **{"eos_token_ids": ENDS, **kwargs})


def responses(rollout: Rollout) -> list[list[int]]:
    return [response for _, response in rollout.sequences()]


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_log_probs_are_the_trainers(architecture: str) -> None:
    made = sampler(architecture, max_rows=5)
    rollout = made.generate(prompts(12), Sampling(temperature=0.8, max_new_tokens=12, samples_per_prompt=2, seed=3))
    ours = action_logprobs(made.policy, rollout, temperature=0.8, max_tokens=200)
    torch.testing.assert_close(rollout.logprobs, ours, atol=1e-5, rtol=0)
    assert not rollout.exact and rollout.group_ids.tolist() == [i for i in range(12) for _ in range(2)]
    for response, reason in zip(responses(rollout), rollout.finish_reasons, strict=True):
        assert reason == ("stop" if response[-1] in ENDS else "length") and not {*response[:-1]} & {*ENDS}


def test_it_leaves_no_trace() -> None:
    made, before = sampler(), torch.get_rng_state()
    made = sampler()
    before = torch.get_rng_state()
    made.generate(prompts(4), Sampling(max_new_tokens=4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(m.training for m in made.policy.modules())
    assert made.policy.config._attn_implementation == PACKED


def test_modes_that_were_mixed_are_mixed_again() -> None:
    made = sampler()
    body: Any = made.policy.base_model
    body.layers[0].eval()
    found = [m.training for m in made.policy.modules()]
    made.generate(prompts(2), Sampling(max_new_tokens=2))
    assert [m.training for m in made.policy.modules()] == found and {True, False} == {*found}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_is_an_error_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a word, as by SystemExit: nobody would ever answer."""
    monkeypatch.setattr(generate_batch, "POLL_S", 0.05)
    made, calls = sampler(), itertools.count()
    before = [m.training for m in made.policy.modules()]

    def dies(*_: Any) -> None:
        if threading.current_thread() is not threading.main_thread() and next(calls) == 3:
            raise SystemExit

    hook = made.policy.get_input_embeddings().register_forward_hook(dies)
    with pytest.raises(
        RolloutError, match=r"generate_batch lost \d of 6 requests: .*; use rollout.engine = 'embedded'"
    ):
        made.generate(prompts(6), Sampling(max_new_tokens=9))
    hook.remove()
    assert [m.training for m in made.policy.modules()] == before
    assert made.policy.config._attn_implementation == PACKED and not generating()
    assert len(made.generate(prompts(6), Sampling(max_new_tokens=9))) == 6


def test_an_error_of_whoever_listens_ends_the_rollout_at_once() -> None:
    """The requests that are left are not answered first, and the thread has ended."""
    made, steps = sampler(eos_token_ids=()), []
    given = Prompts(token_ids=((1, 2), (3, 4)), limits=(1, 100))
    hook = made.policy.get_input_embeddings().register_forward_hook(lambda *_: steps.append(1))

    def fails(*_: Any) -> None:
        raise KeyError("listener")

    with pytest.raises(KeyError, match="listener"):
        made.generate(given, Sampling(max_new_tokens=100), fails)
    hook.remove()
    assert len(steps) < 60 and not generating()
    assert all(m.training for m in made.policy.modules()) and made.policy.config._attn_implementation == PACKED


def generating() -> list[threading.Thread]:
    """Threads of transformers that still run."""
    return [t for t in threading.enumerate() if "_run_generation_loop" in t.name]


def test_memory_is_half_of_what_is_free_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the config says how much; on a CPU there is no limit."""
    page = generate_batch.PAGE * models.kv_bytes_per_token(tiny.policy())
    monkeypatch.setattr(kv, "free_bytes", lambda device: 2 * 7 * page)
    assert kv.kv_budget(None, torch.device("cuda")) == 7 * page and kv.kv_budget(None, torch.device("cpu")) is None
    assert kv.kv_budget(5, torch.device("cuda")) == 5 == kv.kv_budget(5, torch.device("cpu"))
    monkeypatch.setattr(generate_batch, "kv_budget", lambda asked, device: kv.kv_budget(asked, torch.device("cuda")))
    given = [((1, 2), 60)] * 30  # two pages each
    assert sampler()._sizes(given).num_blocks == 7
    rollout = sampler(eos_token_ids=()).generate(prompts(30), Sampling(max_new_tokens=40))
    assert [len(r) for r in responses(rollout)] == [40] * 30


def test_tokens_come_from_the_weights_as_they_are_now() -> None:
    """With a long prefix in common, whose keys a manager that lives on would keep."""
    made = sampler()
    given = Prompts(token_ids=tuple((*range(1, 46), i) for i in range(4)))
    made.generate(given, Sampling(max_new_tokens=4, seed=3))
    with torch.no_grad():
        for p in made.policy.parameters():
            p.mul_(0.9)
    rollout = made.generate(given, Sampling(max_new_tokens=4, seed=3))
    ours = action_logprobs(made.policy, rollout, temperature=1.0, max_tokens=400)
    torch.testing.assert_close(rollout.logprobs, ours, atol=1e-5, rtol=0)


def without_psutil(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (utils, offloading_manager):
        monkeypatch.setattr(module, "is_psutil_available", lambda: False)


def test_a_rollout_without_psutil_says_nothing_of_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Which transformers asks for sizes that are given; what else it logs is logged."""
    without_psutil(monkeypatch)
    sampler().generate(prompts(2), Sampling(max_new_tokens=2))
    assert "psutil" not in caplog.text
    generate_batch.LOG.warning("psutil is missing")
    assert "psutil is missing" in caplog.text


def test_sizes_that_do_not_fit_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what transformers said of psutil, which then matters."""
    monkeypatch.setattr(utils, "_get_numa_nodes_memory", lambda *_: None)
    without_psutil(monkeypatch)
    made = sampler()
    with pytest.raises(RolloutError, match=r"does not start: .* lower rollout.max_rows .* \(.* install psutil\.\)"):
        made.generate(prompts(2), Sampling(max_new_tokens=2))
    assert made.policy.config._attn_implementation == PACKED and all(m.training for m in made.policy.modules())


def test_a_request_that_fails_is_not_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    made = sampler()
    sizes = made._sizes

    def too_small(requests: Any) -> Any:
        config = sizes(requests)
        config.num_blocks = 1
        return config

    monkeypatch.setattr(made, "_sizes", too_small)
    given = Prompts(token_ids=((1, 2), tuple(range(1, 48)) * 2))
    with pytest.raises(RuntimeError, match=r"generate_batch lost 1 of 2 requests: .*; use rollout.engine = 'embedded'"):
        made.generate(given, Sampling(max_new_tokens=4))


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="'generate_batch' has no stop sequences"):
        sampler().generate(prompts(2), Sampling(stop_sequences=((1, 2),)))
    with pytest.raises(ValueError, match=r"exceeds the model's\s+context of 128"):
        sampler().generate(Prompts(token_ids=((1,) * 100,)), Sampling())
    with pytest.raises(ValueError, match=r"raise rollout.kv_gib"):
        sampler(kv_bytes=1000).generate(prompts(2), Sampling(max_new_tokens=4))


def test_a_run_file_can_ask_for_it() -> None:
    made = engine(rollout={"engine": "generate_batch"})
    assert isinstance(made.rollout_engine, GenerateBatchEngine)
    rollout = made.generate(prompts(len(SCORES)))
    assert made.update(made.score(rollout, SCORES))["val/ratio_max_first"] == 1.0
