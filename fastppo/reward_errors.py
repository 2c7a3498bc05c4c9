"""What becomes of a reward that fails: the run ends, it is asked again, or the samples without a score are left out."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from fastppo.batch import Sample
from fastppo.endpoints import HTTPReward, RewardError, wait_s
from fastppo.protocols import Reward

Checked = tuple[Tensor, Tensor | None]
Check = Callable[..., Checked]  # (scores, missing=) -> scores per sequence and per action; raises RewardError
SHOWN = 3  # samples named in the log, of those an iteration leaves out


@dataclass(frozen=True)
class OnError:
    """The policy of one reward, as `RewardConfig.on_error` and `retries` say."""

    way: Literal["fail", "retry", "skip"] = "fail"
    retries: int = 3


@dataclass
class Asked:
    """What a reward gave in the end."""

    scores: Checked  # 0 where there is none
    missing: dict[int, str] = field(default_factory=dict)  # why a sample has no score
    counts: dict[str, int] = field(default_factory=dict)


def ask(reward: Reward, samples: Sequence[Sample], on_error: OnError, check: Check) -> Asked:
    """
    Raises:
        RewardError: it failed and `on_error` is "fail", or it failed `retries` more times.
    """
    if on_error.way == "skip":
        missing: dict[int, str] = {}
        scores = check(_one_by_one(reward, samples, missing), missing=missing)
        for place in sorted(missing)[:SHOWN]:
            print(f"left out sample {place}: {missing[place]}", flush=True)
        if len(missing) > SHOWN:
            print(f"left out {len(missing) - SHOWN} more samples that reward {reward.name!r} gave no score", flush=True)
        return Asked(scores, missing, {"skipped": len(missing)})
    for tries in itertools.count():
        try:
            return Asked(check(reward(samples)), counts={"retries": tries} if on_error.way == "retry" else {})
        except RewardError as error:
            if on_error.way == "fail" or tries == on_error.retries:
                raise
            print(f"asking again ({tries + 1} of {on_error.retries}): {error}", flush=True)
            time.sleep(wait_s(tries))
    raise AssertionError("unreachable")


def plain(scores: Any) -> Any:
    """Tensors and NumPy arrays, also inside lists, as Python numbers."""
    if isinstance(scores, list | tuple):
        return [plain(x) for x in scores]
    return scores.tolist() if hasattr(scores, "tolist") else scores


def _one_by_one(reward: Reward, samples: Sequence[Sample], missing: dict[int, str]) -> list[Any]:
    """Scores of all samples, None where there is none: an endpoint is asked batch by batch, another reward for all and,
    when it raises, for each."""
    size = reward.batch_size if isinstance(reward, HTTPReward) else len(samples)
    parts = (range(start, min(start + size, len(samples))) for start in range(0, len(samples), size))
    return [score for places in parts for score in _some(reward, samples, places, missing)]


def _some(reward: Reward, samples: Sequence[Sample], places: Sequence[int], missing: dict[int, str]) -> list[Any]:
    try:
        scores = plain(reward([samples[i] for i in places]))
        if isinstance(scores, list) and len(scores) == len(places):
            return scores
        got = f"{len(scores)} scores" if isinstance(scores, list) else f"a {type(scores).__name__}"
        why = f"reward {reward.name!r} must return one score per sample ({len(places)}), got {got}"
    except RewardError as error:
        if error.divisible and len(places) > 1:
            return [score for i in places for score in _some(reward, samples, [i], missing)]
        why = str(error)
    missing |= dict.fromkeys(places, why)
    return [None] * len(places)
