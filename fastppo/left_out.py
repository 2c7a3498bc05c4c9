"""Samples without a score take no part: they leave the rollout before anything is computed from it."""

from collections.abc import Sequence

import torch

from fastppo.batch import Rollout
from fastppo.endpoints import RewardError
from fastppo.rewards import Scores


def only_scored(
    rollout: Rollout, scores: Scores, *, at_least: int = 1, grouped: bool = False
) -> tuple[Rollout, Scores]:
    """The sequences that have a score, and their scores.

    Args:
        at_least: how many are needed, on every rank.
        grouped: they are compared with others of their prompt, so that one left alone is left out too.

    Raises:
        RewardError: fewer than `at_least` have one.
    """
    if not scores.missing:
        return rollout, scores
    keep = torch.ones(len(rollout), dtype=torch.bool, device=rollout.input_ids.device)
    keep[list(scores.missing)] = False
    if grouped:
        _, group = rollout.group_ids.unique(return_inverse=True)
        keep &= (group[keep].bincount(minlength=int(group.max()) + 1) > 1)[group]
    left = int(keep.sum())
    if left < at_least:
        why = f"only {left} of {len(rollout)} samples can be trained on, and it takes {at_least}"
        raise RewardError(f"{why}; the first without a score: {next(iter(scores.missing.values()))}")
    actions = keep.repeat_interleave(rollout.action_counts)
    tokens = None if scores.tokens is None else scores.tokens[actions]
    parts = {name: part[keep] for name, part in scores.parts.items()}
    counts = {**scores.counts, "rollout/left_out": float(len(rollout) - left)}
    return rollout.where(keep), Scores(scores.sequences[keep], tokens, parts, {}, counts)


def with_gaps(values: Sequence[float], missing: Sequence[int], total: int) -> list[float | None]:
    """The values of `total` samples in order, None for those missing."""
    rest = iter(values)
    return [None if i in missing else next(rest) for i in range(total)]
