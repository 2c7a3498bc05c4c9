"""Statistics of the loss ops: float64 sums over rows that have a weight, which add up exactly over any split."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from fastppo_kernels.reference import PPORows, PPOTerms

Stats = dict[str, Tensor]


def merge_stats(parts: Iterable[Mapping[str, Tensor]]) -> Stats:
    """Statistics of the union of rows from the statistics of its parts, however it was split.

    Args:
        parts: dictionaries of 0-d tensors whose keys end in `_sum`, `_count` (added) or `_max` (maximum taken).

    Returns:
        One dictionary with every key that occurs; no host synchronisation.

    Raises:
        ValueError: a key has none of the three endings, so nobody can say how it adds up.
    """
    merged: Stats = {}
    for part in parts:
        for key, value in part.items():
            if not key.endswith(("_sum", "_count", "_max")):
                raise ValueError(f"a statistic must end in _sum, _count or _max, got {key!r}; rename it before merging")
            merged[key] = value if key not in merged else _combine(key, merged[key], value)
    return merged


def _combine(key: str, a: Tensor, b: Tensor) -> Tensor:
    return torch.maximum(a, b) if key.endswith("_max") else a + b


def ppo_stats(
    logprobs: Tensor,
    entropy: Tensor | None,
    rows: "PPORows",
    terms: "PPOTerms",
    live: Tensor,
    ref_kl: Mapping[str, Tensor],
) -> Stats:
    """Sums over the live rows; `fastppo_kernels.ppo_loss` lists the keys. `ref_kl` has the estimators by name."""
    columns = {
        "token_count": live,
        "policy_loss_sum": rows.weights * terms.policy,
        "kl_loss_sum": rows.weights * terms.kl,
        "clip_count": terms.clipped,
        "clip_low_count": terms.clipped & (rows.advantages < 0),
        "clip_high_count": terms.clipped & (rows.advantages > 0),
        "dual_clip_count": terms.dual_clipped,
        "ratio_sum": terms.ratio,
        "ratio_sq_sum": terms.ratio.square(),
        "old_k1_sum": -terms.log_ratio,
        "old_k2_sum": 0.5 * terms.log_ratio.square(),
        "old_k3_sum": terms.k3,
        "logprob_sum": logprobs,
    }
    if entropy is not None:
        columns["entropy_sum"] = entropy
    columns |= {f"ref_{name}_sum": kl for name, kl in ref_kl.items()}
    largest = {"ratio_max": _largest(terms.ratio, live)}
    if rows.sampler_logprobs is not None:
        columns["gap_sum"] = (logprobs - rows.sampler_logprobs).abs()
        largest["gap_max"] = _largest(columns["gap_sum"], live)
    return {**_sum_columns(columns, live), **largest}


def value_stats(values: Tensor, returns: Tensor, loss: Tensor, square: Tensor, clipped: Tensor, live: Tensor) -> Stats:
    """Sums over the live rows; `fastppo_kernels.value_loss` lists the keys. All arguments (R,)."""
    columns = {
        "token_count": live,
        "value_loss_sum": loss,
        "value_clip_count": clipped,
        "value_sum": values,
        "value_sq_sum": values.double().square(),
        "error_sq_sum": square,
        "return_sum": returns,
        "return_sq_sum": returns.double().square(),
    }
    return _sum_columns(columns, live)


def _largest(column: Tensor, live: Tensor) -> Tensor:
    return F.pad(torch.where(live, column.detach(), 0), (0, 1)).amax().double()  # the padding makes R = 0 legal


def _sum_columns(columns: Mapping[str, Tensor], live: Tensor) -> Stats:
    stacked = torch.stack([column.detach().double() for column in columns.values()])
    return dict(zip(columns, torch.where(live, stacked, 0).sum(dim=1).unbind(), strict=True))
