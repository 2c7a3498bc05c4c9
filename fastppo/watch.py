"""Monitors that say when a run drifts: once per crossing of a threshold in the log, every iteration in the metrics.

They read what an iteration logs anyway. What they remember is a part of the checkpoint.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastppo.config_watch import Monitor, WatchConfig

CRITIC_STARTS = 20  # iterations in which a critic may explain nothing yet


class DriftError(RuntimeError):
    """A monitor named in `watch.stop` crossed its threshold."""


@dataclass(frozen=True)
class Quantity:
    """What a monitor looks at: a mean over the last iterations, and its bound."""

    metric: str
    bound: float | None
    below: bool  # whether being below the bound is the alarm
    means: str  # what it is a sign of
    after: int = 0  # iterations before it counts


def quantities(config: WatchConfig) -> dict[Monitor, Quantity]:
    """The monitors that compare a mean with a number."""
    return {
        "kl": Quantity("objective/kl", config.max_kl, False, "the policy is far from the reference"),
        "update_kl": Quantity("policy/kl_last", config.max_update_kl, False, "updates move the policy far"),
        "clipfrac": Quantity("policy/clipfrac_avg", config.max_clipfrac, False, "most of the gradient is clipped away"),
        "ratio": Quantity("val/ratio_max", config.max_ratio, False, "single tokens move far in one update"),
        "ess": Quantity("val/ess", config.min_ess, True, "the batch is stale: fewer epochs, or a lower rate"),
        "entropy": Quantity("watch/entropy_kept", config.min_entropy, True, "the policy has collapsed"),
        "explained_variance": Quantity(
            "val/explained_variance", config.min_explained_variance, True, "the critic misleads", CRITIC_STARTS
        ),
        "length_correlation": Quantity(
            "watch/length_correlation_abs", config.max_length_correlation, False, "the score follows the length"
        ),
    }


@dataclass
class Watch:
    """The monitors of a run. `state` and `load` keep what they remember."""

    config: WatchConfig
    seen: dict[str, list[float]] = field(default_factory=dict)  # by monitor: the last `window` values
    entropies: list[float] = field(default_factory=list)  # nats per token, of the first `window` iterations
    best: tuple[float, float] | None = None  # of the evaluation that the judge liked most: score trained on, judge
    alarms: dict[str, bool] = field(default_factory=dict)  # by monitor that had something to look at
    calm: dict[str, int] = field(default_factory=dict)  # by monitor: times in a row within its threshold
    ending: list[str] = field(default_factory=list)  # monitors of `watch.stop` that began and nobody asked about

    def iteration(self, step: int, stats: Mapping[str, float]) -> list[str]:
        """Take in the metrics of an iteration; returns what there is to say."""
        derived = {**stats, **self._derived(stats)}
        said: list[str] = []
        for name, quantity in quantities(self.config).items():
            value = derived.get(quantity.metric)
            if quantity.bound is None or value is None or not math.isfinite(value) or step <= quantity.after:
                continue
            recent = self.seen[name] = [*self.seen.get(name, []), value][-self.config.window :]
            mean = sum(recent) / len(recent)
            crossed = mean < quantity.bound if quantity.below else mean > quantity.bound
            side = "below" if quantity.below else "above"
            says = f"{quantity.metric} is {mean:.3g}, {side} {quantity.bound:g}: {quantity.means}"
            full = len(recent) == self.config.window
            said += self._alarm(name, crossed and full, says, self.config.window)
        return said

    def evaluation(self, stats: Mapping[str, float]) -> list[str]:
        """Take in an evaluation: did the judge fall below its best while the score that is trained on rose?"""
        if self.config.judge is None:
            return []
        score, judge = stats["eval/scores"], stats[f"eval/reward/{self.config.judge}"]
        if self.best is None or judge > self.best[1]:
            self.best = score, judge
        best_score, best = self.best
        crossed = judge < best - self.config.judge_drop and score > best_score
        says = (
            f"the score rose from {best_score:.3g} to {score:.3g} while the judge {self.config.judge!r} fell from "
            f"{best:.3g} to {judge:.3g}: the reward is being gamed"
        )
        return self._alarm("judge", crossed, says, 1)

    def metrics(self) -> dict[str, float]:
        """`watch/<monitor>`: 1 while it is beyond its threshold, else 0."""
        return {f"watch/{name}": float(on) for name, on in self.alarms.items()}

    def stop(self) -> None:
        """
        Raises:
            DriftError: a monitor of `watch.stop` crossed its threshold since this was last called.
        """
        if self.ending:
            names, self.ending = ", ".join(self.ending), []
            raise DriftError(f"watch.stop: {names} crossed; --resume goes on from here in spite of it")

    def state(self) -> dict[str, Any]:
        """What is remembered; JSON, a copy."""
        names = ("seen", "entropies", "best", "alarms", "calm")
        return copy.deepcopy({name: getattr(self, name) for name in names})

    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        state = copy.deepcopy(dict(state))
        self.seen, self.entropies = state["seen"], state["entropies"]
        self.alarms, self.calm = state["alarms"], state["calm"]
        self.best = None if state["best"] is None else (state["best"][0], state["best"][1])

    def _derived(self, stats: Mapping[str, float]) -> dict[str, float]:
        derived: dict[str, float] = {}
        correlation = stats.get("objective/score_length_correlation")
        if correlation is not None:
            derived["watch/length_correlation_abs"] = abs(correlation)
        tokens, entropy = stats.get("rollout/response_tokens", 0.0), stats.get("objective/entropy")
        if entropy is not None and math.isfinite(entropy) and tokens > 0:  # else no later one could be compared
            if len(self.entropies) < self.config.window:
                self.entropies.append(entropy / tokens)
            start = sum(self.entropies) / len(self.entropies)
            derived["watch/entropy_kept"] = entropy / tokens / max(start, 1e-9)
        return derived

    def _alarm(self, name: str, crossed: bool, says: str, patience: int) -> list[str]:
        """Said when it begins, not while it lasts; it is over when `patience` looks in a row found nothing."""
        before = self.alarms.get(name, False)
        began = crossed and not before
        self.calm[name] = 0 if crossed else self.calm.get(name, 0) + 1
        self.alarms[name] = crossed or (before and self.calm[name] < patience)
        self.ending += [name] if began and name in self.config.stop else []
        return [f"watch: {name}: {says}"] if began else []
