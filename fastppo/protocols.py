"""Where users plug in: a source of rollouts and a source of scores."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import nn

from fastppo.batch import FinishReason, Prompts, Rollout, Sample, Sampling

SampleScores = list[float] | list[list[float]]
"""One score per sample, or one list per sample with a score for each response token."""

OnFinish = Callable[[int, list[int], FinishReason], None]
"""Told of each response as it ends: its place in the rollout, its token ids and how it ended. A rollout that is redone
for want of memory tells of the same responses again."""


class RolloutEngine(Protocol):
    """Samples responses of the current policy.

    `generate` may take a third argument, `on_finish: OnFinish | None = None`; without it rewards wait for the whole
    rollout.
    """

    def generate(self, prompts: Prompts, sampling: Sampling) -> Rollout: ...

    def sync_weights(self, policy: nn.Module, version: int) -> None:
        """Take over the weights of `policy`; `version` counts the updates."""
        ...


class Reward(Protocol):
    """Scores responses. Anything callable with a `name` will do."""

    name: str

    def __call__(self, samples: Sequence[Sample]) -> SampleScores: ...
