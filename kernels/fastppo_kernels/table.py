"""What a backend reports of every row: one line of numbers, a column each, and the sums over the lines.

A row kernel writes a PPO line of 16 float32 numbers, 64 bytes, next to the gradient of its row; a value kernel writes
8. `ppo_table` and `value_table` define the columns in plain PyTorch, any float dtype.

    loss         weight * (policy + kl + old_kl - entropy_coef * H), what the objective sums
    policy_loss  weight * policy                      kl_loss     weight * kl, coefficient included
    logprob      of the target, nats                  entropy     of the row, nats; 0 if not asked for
    log_ratio    logprob - old logprob, unclamped     ratio       exp of it, clamped to +-20
    old_k3       r - 1 - log r                        ref_k1      logprob - reference logprob; 0 without one
    ref_k3       exp(-ref_k1) - 1 + ref_k1            gap         |logprob - sampler's|; 0 without one
    clip_low     1 if clipped with A < 0              clip_high   1 if clipped with A > 0
    dual_clip    1 if the dual clip binds             dlogprob    d loss / d logprob, weight included
    live         1; a row of weight 0 is 0 in every column
"""

from types import ModuleType

import torch
from torch import Tensor

from fastppo_kernels import reference
from fastppo_kernels.reference import PPORows, PPOTerms
from fastppo_kernels.settings import PPOSettings
from fastppo_kernels.stats import Stats

PPO_COLUMNS = (
    *("loss", "policy_loss", "kl_loss", "logprob", "entropy", "ratio", "log_ratio", "old_k3"),
    *("clip_low", "clip_high", "dual_clip", "ref_k1", "ref_k3", "gap", "dlogprob", "live"),
)
VALUE_COLUMNS = ("loss", "value", "error_sq", "clipped", "return", "dvalue", "live", "unused")
LOSS = 0  # first in both


def ppo_table(logprobs: Tensor, entropy: Tensor | None, rows: PPORows, settings: PPOSettings) -> Tensor:
    """(R, 16) in the working dtype of `logprobs`; inputs as in `fastppo_kernels.ppo_loss`, nothing cleaned yet."""
    live, dtype = rows.weights != 0, reference.working_dtype(logprobs)
    rows = rows.cleaned(live, dtype)
    logprobs = torch.where(live, logprobs.detach().to(dtype), 0)
    entropy = torch.zeros_like(logprobs) if entropy is None else torch.where(live, entropy.detach().to(dtype), 0)
    terms = reference.ppo_token_terms(logprobs, rows, settings)
    per_row = terms.policy + terms.kl + terms.old_kl - settings.entropy_coef * entropy
    zero = torch.zeros_like(entropy)
    estimates = {} if rows.ref_logprobs is None else reference.kl_estimates(logprobs, rows.ref_logprobs)
    columns = {
        "loss": rows.weights * per_row,
        "policy_loss": rows.weights * terms.policy,
        "kl_loss": rows.weights * terms.kl,
        "logprob": logprobs,
        "entropy": entropy,
        "ratio": terms.ratio,
        "log_ratio": terms.log_ratio,
        "old_k3": terms.k3,
        "clip_low": terms.clipped & (rows.advantages < 0),
        "clip_high": terms.clipped & (rows.advantages > 0),
        "dual_clip": terms.dual_clipped,
        "ref_k1": estimates.get("k1", zero),
        "ref_k3": estimates.get("k3", zero),
        "gap": zero if rows.sampler_logprobs is None else (logprobs - rows.sampler_logprobs).abs(),
        "dlogprob": rows.weights * _dlogprob(logprobs, rows, terms, settings),
        "live": live,
    }
    stacked = torch.stack([columns[name].to(dtype) for name in PPO_COLUMNS], 1)
    return torch.where(live[:, None], stacked, 0)


def _dlogprob(logprobs: Tensor, rows: PPORows, terms: PPOTerms, settings: PPOSettings) -> Tensor:
    """Derivative of a row's objective, by hand: autograd does not run inside an operator."""
    limit = reference.EXPONENT_LIMIT
    follows = ~(terms.clipped | terms.dual_clipped | (terms.log_ratio.abs() > limit))  # so that a NaN is followed
    slope = torch.where(follows, -rows.advantages * terms.ratio, 0)
    if rows.is_weights is not None:
        slope = rows.is_weights * slope
    if settings.kl_coef and rows.ref_logprobs is not None:
        d = logprobs - rows.ref_logprobs
        one = torch.ones_like(d)
        slopes = {"k1": one, "k3": -torch.expm1((-d).clamp(-limit, limit))}
        slope = slope + settings.kl_coef * slopes.get(settings.kl_estimator, d)  # k2 and the straight-through ones: d
    if settings.old_kl_coef:
        slope = slope + settings.old_kl_coef * torch.expm1(terms.log_ratio.clamp(-limit, limit))
    return slope


def table_sums(table: Tensor) -> Tensor:
    """(3, columns) float64: sum, sum of squares and maximum of every column; zeros without rows."""
    wide = table.double()
    if table.shape[0] == 0:
        return wide.new_zeros(3, table.shape[1])
    return torch.stack([wide.sum(0), wide.square().sum(0), wide.amax(0)])


def with_sums(table: Tensor, backend: ModuleType) -> tuple[Tensor, Tensor, Tensor]:
    """(loss (), table, sums (3, columns) float64): all that the loss and the statistics need of a table."""
    sums = backend.table_sums(table)
    return sums[0, LOSS].to(table.dtype, copy=True), table, sums


def ppo_stats(sums: Tensor, *, entropy: bool, reference: bool, sampler: bool) -> Stats:
    """The statistics from the sums of a PPO table; the flags say which optional columns were filled."""
    total, square, largest = (dict(zip(PPO_COLUMNS, line, strict=True)) for line in sums.unbind())
    stats = {
        "token_count": total["live"],
        "policy_loss_sum": total["policy_loss"],
        "kl_loss_sum": total["kl_loss"],
        "clip_count": total["clip_low"] + total["clip_high"],
        "clip_low_count": total["clip_low"],
        "clip_high_count": total["clip_high"],
        "dual_clip_count": total["dual_clip"],
        "ratio_sum": total["ratio"],
        "ratio_sq_sum": square["ratio"],
        "ratio_max": largest["ratio"],
        "old_k1_sum": -total["log_ratio"],
        "old_k2_sum": 0.5 * square["log_ratio"],
        "old_k3_sum": total["old_k3"],
        "logprob_sum": total["logprob"],
    }
    if entropy:
        stats["entropy_sum"] = total["entropy"]
    if reference:
        stats["ref_k1_sum"], stats["ref_k3_sum"] = total["ref_k1"], total["ref_k3"]
        stats["ref_k2_sum"] = 0.5 * square["ref_k1"]
    if sampler:
        stats["gap_sum"], stats["gap_max"] = total["gap"], largest["gap"]
    return stats


def value_table(values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip: float | None) -> Tensor:
    """(R, 8) in the working dtype of `values`; inputs as in `fastppo_kernels.value_loss`, nothing cleaned yet."""
    live, dtype = weights != 0, reference.working_dtype(values)
    old, target, w = (torch.where(live, x.detach().to(dtype), 0) for x in (old_values, returns, weights))
    v = torch.where(live, values.detach().to(dtype), 0)
    error = v - target
    clipped, worst, slope = torch.zeros_like(live), error.square(), error
    if clip is not None:
        other = reference.clipped_values(v, old, clip) - target
        clipped = other.square() > worst
        worst = torch.where(clipped, other.square(), worst)
        slope = torch.where(clipped, 0, error)
    columns = (0.5 * w * worst, v, error.square(), clipped, target, w * slope, live, torch.zeros_like(v))
    stacked = torch.stack([x.to(dtype) for x in columns], 1)
    return torch.where(live[:, None], stacked, 0)


def value_stats(sums: Tensor) -> Stats:
    """The statistics from the sums of a value table."""
    total, square, _ = (dict(zip(VALUE_COLUMNS, line, strict=True)) for line in sums.unbind())
    return {
        "token_count": total["live"],
        "value_loss_sum": total["loss"],
        "value_clip_count": total["clipped"],
        "value_sum": total["value"],
        "value_sq_sum": square["value"],
        "error_sq_sum": total["error_sq"],
        "return_sum": total["return"],
        "return_sq_sum": square["return"],
    }
