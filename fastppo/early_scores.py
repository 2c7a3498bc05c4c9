"""Rewards that score responses while others are still sampled."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from fastppo.batch import FinishReason, Prompts, Rollout, Sample
from fastppo.endpoints import RewardError
from fastppo.protocols import Reward

Key = tuple[int, tuple[int, ...]]  # place in the rollout and response tokens
Call = tuple[list[int], Callable[[], list[Any]]]  # places of some samples, and what gives their scores


class EarlyScores:
    """What some rewards say of one rollout that is being sampled: the `on_finish` of its `generate`.

    Args:
        prompts: as given to `generate`, with `samples_per_prompt` responses to each.
        rewards: each with the most samples of one call; a reward is called by one thread, a batch at a time.
        to_sample: makes the sample of a rollout of one response.
    """

    def __init__(
        self, prompts: Prompts, samples_per_prompt: int, rewards: Mapping[str, tuple[Reward, int]], to_sample: Any
    ) -> None:
        self.prompts, self.n, self.to_sample = prompts, samples_per_prompt, to_sample
        self.queues = {name: _Queue(reward, size) for name, (reward, size) in rewards.items()}

    def __call__(self, place: int, tokens: list[int], reason: FinishReason) -> None:
        i = place // self.n
        one = Rollout.pack(
            [self.prompts.token_ids[i]], [tokens], finish_reasons=[reason], records=[self.prompts.records[i]]
        )
        for queue in self.queues.values():
            queue.put((place, tuple(tokens)), one, self.to_sample)

    def scores(self, reward: Reward, samples: Sequence[Sample]) -> list[Any]:
        """Of every sample of the rollout, in order: those that are known, and the rest in one more call.

        Raises:
            RewardError: the reward failed, now or before.
        """
        calls, rest = self.calls(reward, samples)
        if not calls:
            return reward(samples)  # pyright: ignore[reportReturnType]  checked by the caller, as anything of a user
        scores = {place: score for places, call in calls for place, score in zip(places, call(), strict=True)}
        scores |= zip(rest, _called(reward, [samples[i] for i in rest]), strict=True)
        return [scores[place] for place in range(len(samples))]

    def calls(self, reward: Reward, samples: Sequence[Sample]) -> tuple[list[Call], list[int]]:
        """What the reward was asked so far, and the places of the samples that it was not; waits until it has answered.

        A call gives the scores of its places, or raises what the reward raised.
        """
        queue = self.queues.get(reward.name)
        asked = [] if queue is None else queue.results()
        wanted = {(place, tuple(sample.response_ids)) for place, sample in enumerate(samples)}
        calls: list[Call] = []
        for announced, answer in asked:
            which = [i for i, key in enumerate(announced) if key in wanted]
            if which:
                calls.append(([announced[i][0] for i in which], partial(_chosen, answer, which)))
        known = {place for places, _ in calls for place in places}
        return calls, [place for place in range(len(samples)) if place not in known]

    def close(self) -> None:
        """Forget what is still waiting."""
        for queue in self.queues.values():
            queue.pool.shutdown(wait=False, cancel_futures=True)


class Heard:
    """A `Reward` that may have scored some samples of a rollout already.

    The first call takes what is known, an error that there was included; asked again, it asks for all of them again.
    """

    def __init__(self, reward: Reward, early: EarlyScores) -> None:
        self.name, self.reward, self.early, self.told = reward.name, reward, early, False

    def __call__(self, samples: Sequence[Sample]) -> Any:
        first, self.told = not self.told, True
        return self.early.scores(self.reward, samples) if first else self.reward(samples)

    def calls(self, samples: Sequence[Sample]) -> tuple[list[Call], list[int]]:
        return self.early.calls(self.reward, samples)


class _Queue:
    """Responses that wait for one reward, and its thread."""

    def __init__(self, reward: Reward, size: int) -> None:
        self.reward, self.size = reward, size
        self.pool = ThreadPoolExecutor(1, thread_name_prefix=f"reward {reward.name}")
        self.waiting: list[tuple[Key, Rollout, Any]] = []
        self.batches: list[Future[tuple[list[Key], Future[list[Any]]]]] = []
        self.heard: set[Key] = set()
        self.lock = threading.Lock()

    def put(self, key: Key, one: Rollout, to_sample: Any) -> None:
        """Each once: a rollout that is redone for want of memory tells of its responses again."""
        if key in self.heard:
            return
        self.heard.add(key)
        with self.lock:
            self.waiting.append((key, one, to_sample))
        self.batches.append(self.pool.submit(self._score_some))

    def results(self) -> list[tuple[list[Key], Future[list[Any]]]]:
        """Of all that was put in: what was asked for in a call, and its answer."""
        self.pool.shutdown(wait=True)
        return [batch.result() for batch in self.batches]

    def _score_some(self) -> tuple[list[Key], Future[list[Any]]]:
        """What has gathered while the call before this one ran, up to the batch size."""
        with self.lock:
            batch, self.waiting = self.waiting[: self.size], self.waiting[self.size :]
        answer: Future[list[Any]] = Future()
        try:
            answer.set_result(_called(self.reward, [to_sample(one) for _, one, to_sample in batch]))
        except RewardError as error:
            answer.set_exception(error)
        return [key for key, *_ in batch], answer


def _chosen(answer: Future[list[Any]], which: list[int]) -> list[Any]:
    scores = answer.result()
    return [scores[i] for i in which]


def _called(reward: Reward, samples: Sequence[Sample]) -> list[Any]:
    if not samples:
        return []
    scores: Any = reward(samples)
    scores = scores.tolist() if hasattr(scores, "tolist") else scores
    if not isinstance(scores, list | tuple) or len(scores) != len(samples):
        got = f"{len(scores)} scores" if isinstance(scores, list | tuple) else f"a {type(scores).__name__}"
        raise RewardError(f"reward {reward.name!r} must return one score per sample ({len(samples)}), got {got}")
    return list(scores)
