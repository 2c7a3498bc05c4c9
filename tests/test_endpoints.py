"""Endpoints that answer too much, too slowly, too deep or elsewhere, and targets that are no URL."""

import threading
from typing import Any

import pytest

from endpoint import serve_fixture  # noqa: F401
from fastppo import HTTPReward, RewardError, Sample
from fastppo.config_inputs import RewardConfig
from fastppo.endpoints import REWARD_THREAD, wait_s


def samples(count: int) -> list[Sample]:
    return [
        Sample(prompt="", response="", prompt_ids=[1], response_ids=[2], finish_reason="stop") for _ in range(count)
    ]


def test_an_answer_that_never_ends_is_given_up(serve: Any, monkeypatch: Any) -> None:
    """By its size, and where it comes in a byte at a time: then nothing of the call stays behind."""
    monkeypatch.setattr("fastppo.endpoints.MAX_ANSWER", 1 << 17)
    with pytest.raises(RewardError, match="the answer has more than 131072 bytes"):
        HTTPReward(serve(b" " * (1 << 18)).url, retries=0)(samples(50))
    server = serve("drip")
    before = set(threading.enumerate())
    with pytest.raises(RewardError, match="timed out"):
        HTTPReward(server.url, retries=0, timeout_s=0.2)(samples(1))
    (left,) = [thread for thread in set(threading.enumerate()) - before if thread.name.startswith(REWARD_THREAD)]
    left.join(5)
    assert not left.is_alive() and not server.release.is_set()


def test_a_redirect_is_not_followed_but_named(serve: Any) -> None:
    """What follows one would ask without the samples."""
    server = serve((302, "http://other/score?token=hunter2"))
    with pytest.raises(
        RewardError, match=r"failed 1 times; .*a redirect to http://other/score\?token=\*\*\*: give that"
    ):
        HTTPReward(server.url, retries=2)(samples(1))
    assert len(server.requests) == 1


def test_an_answer_that_nests_too_deep_is_no_answer(serve: Any) -> None:
    with pytest.raises(RewardError, match="the answer must be"):
        HTTPReward(serve(b"[" * 200000).url, retries=0)(samples(1))


def test_the_wait_before_another_try_has_an_end() -> None:
    assert [wait_s(tries) for tries in (0, 1, 2, 6, 7, 10**9)] == [0.5, 1.0, 2.0, 32.0, 60.0, 60.0]


@pytest.mark.parametrize(
    "target",
    ["htps://me:hunter2@judge/", "http://judge/?token=hunter2 ", "http://me:hunter2@judge:80x/", "http://?hunter2\n"],
)
def test_a_target_that_is_no_url_is_refused_without_its_secret(target: str) -> None:
    with pytest.raises(
        ValueError, match=r"rewards.target of kind 'http' must be a URL with http://, got \*\*\*"
    ) as error:
        RewardConfig(kind="http", target=target)
    assert "hunter2" not in str(error.value)
