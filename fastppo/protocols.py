"""Where users plug in: a source of rollouts and a source of scores."""

from collections.abc import Sequence
from typing import Protocol

from torch import nn

from fastppo.batch import Prompts, Rollout, Sample, Sampling

SampleScores = list[float] | list[list[float]]
"""One score per sample, or one list per sample with a score for each response token."""


class RolloutEngine(Protocol):
    """Samples responses of the current policy."""

    def generate(self, prompts: Prompts, sampling: Sampling) -> Rollout: ...

    def sync_weights(self, policy: nn.Module, version: int) -> None:
        """Take over the weights of `policy`; `version` counts the updates."""
        ...


class Reward(Protocol):
    """Scores responses. Anything callable with a `name` will do."""

    name: str

    def __call__(self, samples: Sequence[Sample]) -> SampleScores: ...
