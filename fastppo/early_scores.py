"""Rewards that score responses while others are still sampled."""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from fastppo.batch import FinishReason, Prompts, Rollout, Sample
from fastppo.endpoints import RewardError
from fastppo.protocols import Reward

Key = tuple[int, tuple[int, ...]]  # place in the rollout and response tokens


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
        known = self.queues[reward.name].results() if reward.name in self.queues else {}
        keys = [(place, tuple(sample.response_ids)) for place, sample in enumerate(samples)]
        rest = [i for i, key in enumerate(keys) if key not in known]
        if not known:
            return reward(samples)  # pyright: ignore[reportReturnType]  checked by the caller, as anything of a user
        late = _called(reward, [samples[i] for i in rest])
        return [known[key] if key in known else late.pop(0) for key in keys]

    def close(self) -> None:
        """Forget what is still waiting."""
        for queue in self.queues.values():
            queue.pool.shutdown(wait=False, cancel_futures=True)


class Heard:
    """A `Reward` that may have scored some samples of a rollout already."""

    def __init__(self, reward: Reward, early: EarlyScores) -> None:
        self.name, self.reward, self.early = reward.name, reward, early

    def __call__(self, samples: Sequence[Sample]) -> list[Any]:
        return self.early.scores(self.reward, samples)


class _Queue:
    """Responses that wait for one reward, and its thread."""

    def __init__(self, reward: Reward, size: int) -> None:
        self.reward, self.size = reward, size
        self.pool = ThreadPoolExecutor(1, thread_name_prefix=f"reward {reward.name}")
        self.waiting: list[tuple[Key, Rollout, Any]] = []
        self.calls: list[Future[dict[Key, Any]]] = []
        self.lock = threading.Lock()

    def put(self, key: Key, one: Rollout, to_sample: Any) -> None:
        with self.lock:
            self.waiting.append((key, one, to_sample))
        self.calls.append(self.pool.submit(self._score_some))

    def results(self) -> dict[Key, Any]:
        """Of all that was put in."""
        self.pool.shutdown(wait=True)
        return {key: score for call in self.calls for key, score in call.result().items()}

    def _score_some(self) -> dict[Key, Any]:
        """What has gathered while the call before this one ran, up to the batch size."""
        with self.lock:
            batch, self.waiting = self.waiting[: self.size], self.waiting[self.size :]
        samples = [to_sample(one) for _, one, to_sample in batch]
        return dict(zip((key for key, *_ in batch), _called(self.reward, samples), strict=True))


def _called(reward: Reward, samples: Sequence[Sample]) -> list[Any]:
    if not samples:
        return []
    scores: Any = reward(samples)
    scores = scores.tolist() if hasattr(scores, "tolist") else scores
    if not isinstance(scores, list | tuple) or len(scores) != len(samples):
        got = f"{len(scores)} scores" if isinstance(scores, list | tuple) else f"a {type(scores).__name__}"
        raise RewardError(f"reward {reward.name!r} must return one score per sample ({len(samples)}), got {got}")
    return list(scores)
