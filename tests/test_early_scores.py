"""Rewards that score responses as they end: the same numbers, each response once, and no failure lost."""

import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from batches import engine, prompts
from endpoint import serve_fixture  # noqa: F401
from fastppo import HTTPReward, PPOEngine, Prompts, RewardError, Sample, Sampling, WeightedRewards
from fastppo.config import VLLMConfig
from fastppo.demo import make_tokenizer
from fastppo.reward_errors import OnError
from fastppo.rewards import FunctionReward, to_samples
from vllm_protocol import Server, vllm_server_fixture  # noqa: F401

GIVEN = Prompts(
    token_ids=tuple((i, i + 1) for i in range(5)),
    limits=(1, 30, 20, 7, 2),
    records=tuple({"n": i} for i in range(5)),
)
ENGINES = ("embedded", "generate_batch", "vllm")


def made(kind: str, folder: Path, serve: Callable[..., Server]) -> PPOEngine:
    servers = VLLMConfig(servers=(serve().url,), folder=str(folder)) if kind == "vllm" else VLLMConfig()
    rollout = {"engine": kind, "samples_per_prompt": 2, "max_rows": 4, "vllm": servers}
    return engine(tiny.policy("qwen2"), rollout=rollout)


def rewards(*functions: Callable[..., Any], early: dict[str, int]) -> WeightedRewards:
    return WeightedRewards([FunctionReward(f) for f in functions], tokenizer=make_tokenizer(), early=early)


@pytest.mark.parametrize("kind", ENGINES)
def test_a_reward_scores_while_others_are_sampled(
    kind: str, tmp_path: Path, vllm_server: Callable[..., Server]
) -> None:
    calls: list[Sequence[Sample]] = []
    called = threading.Event()

    def score(samples: Sequence[Sample]) -> list[float]:
        calls.append(samples)
        called.set()
        return [len(s.response_ids) + 100.0 * s.record["n"] for s in samples]

    def late(samples: Sequence[Sample]) -> list[float]:
        assert len(samples) == 10
        return [1.0] * 10

    trainer, scorer = made(kind, tmp_path, vllm_server), rewards(score, late, early={"score": 3})
    early = scorer.listen(GIVEN, 2)
    assert early is not None
    heard: list[int] = []

    def on_finish(place: int, tokens: list[int], reason: Any) -> None:
        early(place, tokens, reason)
        heard.append(place)
        assert called.wait(20)  # the reward was asked although others have not ended

    rollout = trainer.generate(GIVEN, Sampling(samples_per_prompt=2, seed=3), on_finish)
    scores = scorer(rollout, early)
    samples = to_samples(rollout, make_tokenizer())
    assert sorted(heard) == list(range(10)) and max(len(c) for c in calls) <= 3
    assert sorted(str(s) for call in calls for s in call) == sorted(str(s) for s in samples)
    assert scores.parts["score"].tolist() == [len(s.response_ids) + 100.0 * s.record["n"] for s in samples]
    assert scores.parts["late"].tolist() == [1.0] * 10


def test_what_was_not_heard_of_is_scored_too() -> None:
    """And a response that is not the one that was announced is scored as it is."""
    trainer, scorer = engine(tiny.policy("qwen2")), rewards(lengths, early={"lengths": 2})
    rollout = trainer.generate(prompts(6))
    early = scorer.listen(prompts(6), 1)
    assert early is not None
    for place in (0, 4):
        early(place, rollout.sequences()[place][1], "stop")
    early(2, [1], "stop")
    expected = [float(len(response)) for _, response in rollout.sequences()]
    assert scorer(rollout, early).sequences.tolist() == expected == scorer(rollout).sequences.tolist()


def lengths(samples: Sequence[Sample]) -> list[float]:
    return [float(len(s.response_ids)) for s in samples]


def raises(samples: Sequence[Sample]) -> list[float]:
    raise KeyError("no answer")


def too_few(samples: Sequence[Sample]) -> list[float]:
    return [1.0] * (len(samples) - 1)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises, "reward 'raises' raised KeyError: 'no answer'"),
        (too_few, r"reward 'too_few' must return one score per sample \(\d\), got \d scores"),
    ],
)
def test_a_reward_that_fails_early_fails(function: Any, message: str) -> None:
    trainer, scorer = engine(tiny.policy("qwen2")), rewards(function, early={function.__name__: 2})
    early = scorer.listen(prompts(4), 1)
    rollout = trainer.generate(prompts(4), on_finish=early)
    with pytest.raises(RewardError, match=message):
        scorer(rollout, early)


def fails_for(*places: int, how: str) -> Callable[[Sequence[Sample]], list[float]]:
    """A reward of the length of a response, which fails for those of some records."""

    def judge(samples: Sequence[Sample]) -> list[float]:
        bad = [s.record["n"] in places for s in samples]
        if how == "raises" and any(bad):
            raise KeyError("no answer")
        return [math.nan if b else float(len(s.response_ids)) for b, s in zip(bad, samples, strict=True)]

    return judge


def told(trainer: PPOEngine, scorer: WeightedRewards) -> tuple[Any, Any]:
    """A rollout, and what heard of it."""
    early = scorer.listen(GIVEN, 2)
    return trainer.generate(GIVEN, Sampling(samples_per_prompt=2, seed=3), early), early


@pytest.mark.parametrize("how", ["raises", "nan"])
def test_samples_that_fail_early_are_left_out_as_they_would_be_late(how: str) -> None:
    """Those and no others, of a call that fails too."""
    trainer = engine(tiny.policy("qwen2"), rollout={"samples_per_prompt": 2, "max_rows": 4})
    judge, other = fails_for(1, 3, how=how), FunctionReward(lengths)
    scorer = WeightedRewards(
        [FunctionReward(judge), other], early={"judge": 3, "lengths": 2}, on_errors=[OnError("skip"), OnError("fail")]
    )
    rollout, early = told(trainer, scorer)
    one, late = scorer(rollout, early), scorer(rollout)
    assert sorted(one.missing) == [2, 3, 6, 7] == sorted(late.missing) and one.counts == late.counts
    assert one.missing == late.missing
    for name in ("judge", "lengths"):
        assert torch.equal(one.parts[name], late.parts[name])


def test_of_an_endpoint_the_batches_that_fail_early_are_left_out_and_not_asked_again(serve: Any) -> None:
    asked: list[list[int]] = []

    def reply(samples: list[dict[str, Any]]) -> Any:
        asked.append([s["record"]["n"] for s in samples])
        return 500 if any(s["record"]["n"] == 3 for s in samples) else {"scores": [1.0] * len(samples)}

    reward = HTTPReward(serve(reply).url, name="judge", batch_size=1, retries=0)
    scorer = WeightedRewards([reward], early={"judge": 1}, on_errors=[OnError("skip")])
    trainer = engine(tiny.policy("qwen2"), rollout={"samples_per_prompt": 2})
    scores = scorer(*told(trainer, scorer))
    assert sorted(scores.missing) == [6, 7] and "HTTP Error 500" in scores.missing[6]
    assert sorted(n for batch in asked for n in batch) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("how", ["raises", "nan"])
def test_a_reward_that_failed_early_is_asked_again_for_all(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastppo.endpoints.FIRST_WAIT", 0.0)
    trainer, healthy = engine(tiny.policy("qwen2"), rollout={"samples_per_prompt": 2}), threading.Event()
    judge, asked = fails_for(1, how=how), []

    def recovers(samples: Sequence[Sample]) -> list[float]:
        asked.append(len(samples))
        return lengths(samples) if healthy.is_set() else judge(samples)

    def scorer(way: Any, retries: int = 2) -> WeightedRewards:
        reward = FunctionReward(recovers, name="recovers")
        return WeightedRewards([reward], early={"recovers": 3}, on_errors=[OnError(way, retries)])

    rollout, early = told(trainer, made := scorer("retry"))
    assert early is not None
    early.queues["recovers"].results()  # all of them have been asked
    healthy.set()
    scores = made(rollout, early)
    assert asked[-1] == 10 and max(asked[:-1]) <= 3 and sum(asked[:-1]) == 10
    assert scores.counts == {"reward/recovers/retries": 1.0}
    assert scores.sequences.tolist() == lengths(to_samples(rollout, None))
    healthy.clear()
    for way in ("retry", "fail"):
        rollout, early = told(trainer, made := scorer(way, retries=0))
        assert early is not None
        early.queues["recovers"].results()
        healthy.set()  # but it is not asked again
        with pytest.raises(RewardError, match="no answer|gave nan"):
            made(rollout, early)
        healthy.clear()


def test_a_response_that_is_told_of_twice_is_scored_once() -> None:
    """As by a rollout that ran out of memory and was redone."""
    calls: list[Sequence[Sample]] = []
    reward = FunctionReward(lambda samples: calls.append(samples) or lengths(samples), name="once")
    trainer, scorer = engine(tiny.policy("qwen2")), WeightedRewards([reward], early={"once": 2})
    early = scorer.listen(prompts(4), 1)
    assert early is not None
    rollout = trainer.generate(prompts(4), Sampling(seed=3), early)
    trainer.generate(prompts(4), Sampling(seed=3), early)
    scorer(rollout, early)
    assert sum(len(samples) for samples in calls) == 4


def test_an_engine_that_tells_nothing_changes_nothing() -> None:
    class Quiet:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def generate(self, prompts: Prompts, sampling: Sampling) -> Any:
            return self.inner.generate(prompts, sampling)

        def sync_weights(self, policy: Any, version: int) -> None: ...

    trainer, scorer = engine(tiny.policy("qwen2")), rewards(lengths, early={"lengths": 2})
    trainer.rollout_engine = Quiet(trainer.rollout_engine)
    early = scorer.listen(prompts(4), 1)
    rollout = trainer.generate(prompts(4), on_finish=early)
    assert scorer(rollout, early).sequences.tolist() == scorer(rollout).sequences.tolist()


def test_early_rewards_are_among_the_rewards() -> None:
    with pytest.raises(ValueError, match=r"early rewards must be among \['lengths'\], got \['other'\]"):
        rewards(lengths, early={"other": 2})
    assert rewards(lengths, early={}).listen(prompts(2), 1) is None
