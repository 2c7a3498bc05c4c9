"""Rewards: what a function or an endpoint returns is what is trained on; what is no score is an error, not a number."""

import asyncio
import math
import re
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from endpoint import serve_fixture  # noqa: F401
from fastppo import FunctionReward, HTTPReward, RewardConfig, RewardError, Rollout, Sample, WeightedRewards
from fastppo.rewards import load_rewards

ROLLOUT = Rollout.pack(
    [[1, 2], [3], [4, 5]], [[6, 7, 8], [], [9, 10]], loss_masks=[[True, False, True], [], [True, True]],
    finish_reasons=["stop", "length", "stop"], records=[{"answer": i} for i in range(3)],
)  # fmt: skip
PER_TOKEN = [[0.5, 0.0, -1.0], [], [2.0, 0.25]]
Function = Callable[[list[Sample]], Any]


def score(*functions: Any, weights: Sequence[float] | None = None, rollout: Rollout = ROLLOUT) -> Any:
    rewards = [FunctionReward(f, name=f"r{i}", timeout_s=30) for i, f in enumerate(functions)]
    return WeightedRewards(rewards, weights=weights)(rollout)


def lengths(samples: list[Sample]) -> list[int]:
    return [len(s.response_ids) for s in samples]


def answers(samples: list[Sample]) -> list[float]:
    return [s.record["answer"] + 0.5 for s in samples]


async def slow_answers(samples: list[Sample]) -> list[float]:
    async def one(sample: Sample) -> float:
        await asyncio.sleep(0.01 * (3 - sample.record["answer"]))
        return sample.record["answer"] + 0.5

    return list(await asyncio.gather(*map(one, samples)))


@pytest.mark.parametrize("function", [answers, slow_answers, "test_rewards:answers"], ids=["plain", "async", "by name"])
def test_a_function_is_given_the_samples_and_its_numbers_are_the_scores(function: Any) -> None:
    assert score(function).sequences.tolist() == [0.5, 1.5, 2.5]


@pytest.mark.parametrize(
    "given", [torch.tensor, np.array, tuple, lambda x: [np.float32(v) for v in x], lambda x: list(map(torch.tensor, x))]
)
def test_arrays_and_tensors_are_numbers_too(given: Callable[[list[float]], Any]) -> None:
    assert score(lambda _: given([0.5, 1.0, -2.0])).sequences.tolist() == [0.5, 1.0, -2.0]
    assert score(lambda _: [torch.tensor(row) for row in PER_TOKEN]).tokens.tolist() == [0.5, -1.0, 2.0, 0.25]


def test_every_reward_is_weighted_and_logged_on_its_own() -> None:
    made = score(lengths, answers, lambda s: [True, False, True], weights=[2.0, -1.0, 0.0])
    assert made.sequences.tolist() == [6 - 0.5, 0 - 1.5, 4 - 2.5] and made.tokens is None
    parts = {name: part.tolist() for name, part in made.parts.items()}
    assert parts == {"r0": [3, 0, 2], "r1": [0.5, 1.5, 2.5], "r2": [1, 0, 1]}


def test_token_scores_land_on_their_actions_and_add_up() -> None:
    """Beside scores of whole responses; a part that is logged is the sum over the response."""
    made = score(lambda _: PER_TOKEN, answers, weights=[2.0, 1.0])
    assert made.tokens.tolist() == [1.0, -2.0, 4.0, 0.5]  # the zero was on tool output
    assert made.sequences.tolist() == [0.5, 1.5, 2.5] and made.parts["r0"].tolist() == [-0.5, 0, 2.25]
    assert made.totals(ROLLOUT).tolist() == [2 * -0.5 + 0.5, 1.5, 2 * 2.25 + 2.5]


def raises(_: list[Sample]) -> list[float]:
    raise KeyError("gold")


async def raises_later(_: list[Sample]) -> list[float]:
    await asyncio.sleep(0)
    raise ZeroDivisionError("no votes")


def leaves(_: list[Sample]) -> list[float]:
    raise SystemExit(3)


BAD_SCORES: dict[str, tuple[Any, str]] = {
    "nan": ([1.0, math.nan, 0.0], "gave nan for sample 1: a score must be a finite number"),
    "inf": ([1.0, 0.0, -math.inf], "gave -inf for sample 2: a score must be a finite number"),
    "beyond float32": ([1e39, 0.0, 0.0], "gave 1e+39 for sample 0: a score must be a finite number"),
    "huge integer": ([0, 10**400, 0], "gave 1" + "0" * 79 + " for sample 1: a score must be a finite number"),
    "none": ([1.0, None, 0.0], "gave None for sample 1: a score must be a finite number"),
    "text": (["1.0", 1.0, 0.0], "gave '1.0' for sample 0: a score must be a finite number"),
    "nan in an array": (np.array([1.0, np.nan, 0.0]), "gave nan for sample 1"),
    "nothing": (None, "must return one score per sample (3), got a NoneType"),
    "one number": (1.0, "must return one score per sample (3), got a float"),
    "too few": ([1.0, 2.0], "must return one score per sample (3), got 2 scores"),
    "too many": ([1.0] * 4, "must return one score per sample (3), got 4 scores"),
    "empty": ([], "must return one score per sample (3), got 0 scores"),
    "a dictionary": ({0: 1.0, 1: 2.0, 2: 3.0}, "must return one score per sample (3), got a dict"),
    "lists, then a number": ([[1.0, 0.0, 1.0], 0.5, [1.0, 1.0]], "gave lists for some samples and numbers for others"),
    "numbers, then a list": ([1.0, [], [1.0, 1.0]], "gave lists for some samples and numbers for others"),
    "token list too short": ([[1.0, 0.0], [], [1.0, 1.0]], "gave 2 token scores for the 3 response tokens of sample 0"),
    "token list too long": ([[1.0, 0, 0], [1.0], [1, 1]], "gave 1 token scores for the 0 response tokens of sample 1"),
    "nan in a token list": ([[1.0, 0.0, 0.0], [], [1.0, math.nan]], "gave nan for sample 2"),
    "lists in lists": ([[[1.0], 0.0, 0.0], [], [1.0, 1.0]], "gave [1.0] for sample 0: a score must be a finite number"),
    "score on tool output": ([[0.0, 1.0, 0.0], [], [0, 0]], "scores tokens outside the loss mask; score the next"),
}


@pytest.mark.parametrize("case", BAD_SCORES)
def test_what_is_not_a_score_is_refused_with_what_was_got(case: str) -> None:
    returned, fragment = BAD_SCORES[case]
    with pytest.raises(RewardError, match=re.escape("reward 'r0' " + fragment)) as error:
        score(lambda _: returned)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("function", "cause", "fragment"),
    [
        (raises, KeyError, "reward 'r0' raised KeyError: 'gold'"),
        (raises_later, ZeroDivisionError, "reward 'r0' raised ZeroDivisionError: no votes"),
        (leaves, SystemExit, "reward 'r0' raised SystemExit: 3"),
    ],
)
def test_what_a_function_raises_is_told_and_kept(function: Function, cause: type, fragment: str) -> None:
    with pytest.raises(RewardError, match=re.escape(fragment)) as error:
        score(function)
    assert isinstance(error.value.__cause__, cause)


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_a_function_that_does_not_return_is_given_up(kind: str) -> None:
    release = threading.Event()

    async def waits_async(samples: list[Sample]) -> list[float]:
        return await asyncio.to_thread(waits, samples)

    def waits(samples: list[Sample]) -> list[float]:
        release.wait(30)
        return [0.0] * len(samples)

    reward = FunctionReward(waits_async if kind == "async" else waits, name="judge", timeout_s=0.1)
    with pytest.raises(RewardError, match="reward 'judge' did not return within timeout_s = 0.1 s"):
        WeightedRewards([reward])(ROLLOUT)
    release.set()


def test_rewards_that_cannot_be_told_apart_or_weighted_are_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("rewards need different names, got ['a', 'a']: set rewards.name")):
        WeightedRewards([FunctionReward(lengths, name="a"), FunctionReward(answers, name="a")])
    with pytest.raises(ValueError, match="got 1 weights for 2 rewards"):
        WeightedRewards([FunctionReward(lengths), FunctionReward(answers)], weights=[1.0])
    with pytest.raises(ValueError, match="at least one reward is needed, got none"):
        WeightedRewards([])


BROKEN_MODULES = {
    "no_such_module": (None, "ModuleNotFoundError: No module named 'no_such_module'; is its folder on PYTHONPATH?"),
    "my.scores": (None, "ModuleNotFoundError: No module named 'my'; is its folder on PYTHONPATH?"),
    "needs_another": ("import not_installed", "ModuleNotFoundError: No module named 'not_installed'"),
    "wrong_name": ("from math import tau2", "ImportError: cannot import name 'tau2' from 'math'"),
    "no_function": ("def g(samples): ...", "AttributeError: module 'no_function' has no attribute 'f'"),
    "fails": ("1 / 0", "ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("module", BROKEN_MODULES)
def test_what_is_wrong_with_a_module_is_what_is_said(module: str, tmp_path: Path, monkeypatch: Any) -> None:
    """A hint at PYTHONPATH helps only where the module itself was not found."""
    source, reason = BROKEN_MODULES[module]
    monkeypatch.syspath_prepend(tmp_path)
    if source is not None:
        (tmp_path / f"{module}.py").write_text(source)
    with pytest.raises(ValueError, match=re.escape(f"cannot import '{module}:f': {reason}")) as error:
        FunctionReward(f"{module}:f")
    assert ("PYTHONPATH" in str(error.value)) == (source is None)


def by_answer(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {"scores": [s["record"]["answer"] * 2 for s in samples]}


def test_an_endpoint_is_sent_whole_samples_in_batches(serve: Any) -> None:
    server = serve(by_answer)
    config = RewardConfig(kind="http", target=server.url, batch_size=2)
    made = load_rewards([config], None, torch.device("cpu"))(ROLLOUT)
    assert made.sequences.tolist() == [0, 2, 4] and list(made.parts) == ["score"]
    assert [len(batch) for batch in server.requests] == [2, 1]
    third = server.requests[1][0]
    assert third == {"prompt": "", "response": "", "prompt_ids": [4, 5], "response_ids": [9, 10]} | {
        "finish_reason": "stop", "record": {"answer": 2},
    }  # fmt: skip


def test_an_endpoint_may_score_tokens(serve: Any) -> None:
    made: Any = WeightedRewards([HTTPReward(serve({"scores": PER_TOKEN}).url)])(ROLLOUT)
    assert made.tokens.tolist() == [0.5, -1.0, 2.0, 0.25]


def test_an_endpoint_that_comes_back_loses_nothing(serve: Any) -> None:
    server = serve(503, "hang up", by_answer)
    assert WeightedRewards([HTTPReward(server.url, retries=2)])(ROLLOUT).sequences.tolist() == [0, 2, 4]
    assert len(server.requests) == 3 and server.requests[0] == server.requests[1] == server.requests[2]


@pytest.mark.parametrize(
    ("reply", "fragment"),
    [
        (500, "HTTP Error 500"),
        (b"<html>busy</html>", "the answer must be {\"scores\": [...]}, got b'<html>busy</html>'"),
        (b"\xff\xfe", 'the answer must be {"scores": [...]}'),
        ([1, 2, 3], 'the answer must be {"scores": [...]}'),
        ({"score": [1, 2, 3]}, 'the answer must be {"scores": [...]}'),
        ({"scores": 3}, 'the answer must be {"scores": [...]}'),
        ("wait", "timed out"),
        ("hang up", "Remote end closed connection"),
        ("cut short", "IncompleteRead"),
    ],
    ids=str,
)
def test_an_endpoint_that_stays_broken_is_named_with_its_last_failure(reply: Any, fragment: str, serve: Any) -> None:
    server = serve(reply)
    retries = int(reply == 500)
    reward = HTTPReward(server.url, name="judge", retries=retries, timeout_s=0.2 if reply == "wait" else 30)
    start = f"reward 'judge': {server.url} failed {retries + 1} times; the last time: "
    with pytest.raises(RewardError, match=re.escape(start) + ".*" + re.escape(fragment)):
        WeightedRewards([reward])(ROLLOUT)
    assert len(server.requests) == retries + 1


def test_an_endpoint_that_is_not_there_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/score"
    with pytest.raises(RewardError, match=f"{url} failed 1 times; the last time: .*refused"):
        WeightedRewards([HTTPReward(url, retries=0)])(ROLLOUT)
    with pytest.raises(ValueError, match="a reward URL starts with http:// or https://, got 'localhost:8000'"):
        HTTPReward("localhost:8000")


@pytest.mark.parametrize(
    ("reply", "fragment"),
    [
        ({"scores": [1.0, 2.0]}, "gave 2 scores for 3 samples"),
        (b'{"scores": [1.0, NaN, 2.0]}', "gave nan for sample 1: a score must be a finite number"),
        ({"scores": [1.0, None, 2.0]}, "gave None for sample 1: a score must be a finite number"),
    ],
)
def test_wrong_scores_of_an_endpoint_are_not_asked_for_again(reply: Any, fragment: str, serve: Any) -> None:
    server = serve(reply)
    with pytest.raises(RewardError, match=re.escape(fragment)):
        WeightedRewards([HTTPReward(server.url, retries=3)])(ROLLOUT)
    assert len(server.requests) == 1


@pytest.mark.parametrize(("status", "asked"), [(400, 1), (429, 2), (503, 2)])
def test_a_request_that_was_refused_is_not_sent_again(status: int, asked: int, serve: Any) -> None:
    server = serve(status)
    with pytest.raises(RewardError, match=f"HTTP Error {status}"):
        WeightedRewards([HTTPReward(server.url, retries=1)])(ROLLOUT)
    assert len(server.requests) == asked


def test_a_record_that_is_no_json_cannot_be_sent(serve: Any) -> None:
    server = serve(by_answer)
    rollout = Rollout.pack([[1]], [[2]], records=[{"answer": object()}])
    with pytest.raises(RewardError, match="a record cannot be sent as JSON: Object of type object is not JSON"):
        WeightedRewards([HTTPReward(server.url)])(rollout)
    assert server.requests == []
