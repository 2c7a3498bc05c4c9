"""Where a run's rollouts come from: one for each batch of prompts, or one that was sampled during the last update."""

import threading
from concurrent.futures import Future
from typing import Any

from fastppo.batch import Prompts, Rollout
from fastppo.data import PromptSource
from fastppo.early_scores import EarlyScores
from fastppo.engine import PPOEngine
from fastppo.rewards import WeightedRewards

Sampled = tuple[Rollout, EarlyScores | None]


class RolloutSource:
    """`next` gives a rollout of the next prompts, and what rewards already said of it.

    With `ahead`, it first gives the servers the weights of now, checks that they have them, and starts the rollout
    after this one: that is sampled while this one is trained on, and is one update old when its turn comes.

    Args:
        total_steps: nothing is sampled for an iteration after it.
    """

    def __init__(
        self, engine: PPOEngine, prompts: PromptSource, rewards: WeightedRewards, total_steps: int, *, ahead: bool
    ) -> None:
        self.engine, self.prompts, self.rewards = engine, prompts, rewards
        self.total_steps, self.is_ahead = total_steps, ahead
        self.metrics: dict[str, float] = {}  # of the last weights the servers got
        self._pending: Future[Sampled] | None = None
        self._listening: list[EarlyScores | None] = []
        self._unused = 0  # prompts of a rollout that has begun and was not handed out

    @property
    def position(self) -> int:
        """Prompts of the rollouts handed out so far: where a run that stops now goes on."""
        return self.prompts.position - self._unused

    def __next__(self) -> Sampled:
        if not self.is_ahead:
            return self._sample(next(self.prompts))
        sampled = (self._pending or self._begin(next(self.prompts))).result()
        self._pending, self._unused = None, 0
        if self.engine.iteration + 1 < self.total_steps:
            prompts = self._draw_ahead()
            self.metrics = self.engine.probe(prompts).metrics("rollout/sync")
            self._pending = self._begin(prompts)
        return sampled

    def close(self) -> None:
        """End a rollout that runs ahead."""
        stop: Any = getattr(self.engine.rollout_engine, "stop", None)
        if self._pending is not None and not self._pending.done() and stop is not None:
            stop()
        for early in self._listening:
            if early is not None:
                early.close()  # else the end of the process waits for every call that is queued

    def _draw_ahead(self) -> Prompts:
        before = self.prompts.position
        prompts = next(self.prompts)
        self._unused = self.prompts.position - before
        return prompts

    def _sample(self, prompts: Prompts, sampling: Any = None) -> Sampled:
        early = self.rewards.listen(prompts, self.engine.config.samples_per_prompt)
        self._listening = [*self._listening[-1:], early]  # of this rollout, and of the one that was handed out
        try:
            return self.engine.generate(prompts, sampling, early), early
        except BaseException:
            if early is not None:
                early.close()
            raise

    def _begin(self, prompts: Prompts) -> "Future[Sampled]":
        sampling = self.engine.sampling.seeded(self.engine.generator)  # here: the update draws from that generator too
        future: Future[Sampled] = Future()

        def run() -> None:
            try:
                future.set_result(self._sample(prompts, sampling))
            except BaseException as error:  # raised where the rollout is asked for
                future.set_exception(error)

        threading.Thread(target=run, daemon=True, name="rollout ahead").start()
        return future
