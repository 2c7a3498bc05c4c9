"""When a run is said to drift."""

import math
from dataclasses import dataclass
from typing import Literal

from fastppo.checks import require, require_positive

Monitor = Literal[
    "kl", "update_kl", "clipfrac", "ratio", "ess", "entropy", "explained_variance", "length_correlation", "judge"
]


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchConfig:
    """Thresholds on means over the last `window` iterations; None: not watched. They change nothing that is trained."""

    window: int = 5
    """Iterations a mean is taken over; nothing is said before there are that many."""
    max_kl: float | None = 50.0
    """Nats per response to the reference (objective/kl)."""
    max_update_kl: float | None = 0.1
    """Nats per token between the policy before and after an update (policy/kl_last)."""
    max_clipfrac: float | None = 0.5
    """Share of tokens whose ratio is clipped (policy/clipfrac_avg)."""
    max_ratio: float | None = 20.0
    """Largest ratio of a token in an update (val/ratio_max)."""
    min_ess: float | None = 0.5
    """Effective sample size of the reused batch over its size (val/ess): below, most of the batch is stale."""
    min_entropy: float | None = 0.05
    """Share of its entropy per token that the policy keeps, against the first `window` iterations."""
    min_explained_variance: float | None = -1.0
    """Of the returns by the values (val/explained_variance), after the first 20 iterations."""
    max_length_correlation: float | None = 0.9
    """Absolute correlation of score and length over the responses of a rollout (objective/score_length_correlation)."""
    judge: str | None = None
    """Name of a reward, usually of weight 0, that must not fall from one evaluation to another while the score that is
    trained on rises; None: not watched."""
    judge_drop: float = 0.0
    """How far it may fall below its highest evaluation."""
    stop: tuple[Monitor, ...] = ()
    """Monitors whose warning ends the run, with a checkpoint; `--resume` goes on in spite of it."""

    def __post_init__(self) -> None:
        require_positive("watch", self, "window", "max_kl", "max_update_kl", "max_clipfrac", "max_ratio")
        require_positive("watch", self, "min_ess", "min_entropy", "max_length_correlation")
        require(0 <= self.judge_drop < math.inf, f"watch.judge_drop must be >= 0, got {self.judge_drop}")
        least = self.min_explained_variance
        legal = least is None or -math.inf < least < 1
        require(legal, f"watch.min_explained_variance must be < 1 and finite, got {least}")

    def check_judge(self, rewards: list[str], *, has_evaluation: bool) -> None:
        """
        Raises:
            ValueError: there is no reward of the judge's name, or no evaluation.
        """
        known = self.judge is None or self.judge in rewards
        require(known, f"watch.judge must be the name of a reward, one of {rewards}, got {self.judge!r}")
        require(self.judge is None or has_evaluation, "watch.judge goes by evaluations: set data.eval_prompts")
        require(
            "judge" not in self.stop or self.judge is not None, "watch.stop has 'judge', so watch.judge must be set"
        )
