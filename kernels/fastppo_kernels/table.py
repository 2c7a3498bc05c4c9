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

import torch
import torch.nn.functional as F
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
    follows = ~terms.clipped & ~terms.dual_clipped & (terms.log_ratio.abs() <= limit)
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


def ppo_sums(table: Tensor, *, entropy: bool, reference: bool, sampler: bool) -> tuple[Tensor, Stats]:
    """(loss (), stats) of a PPO table, summed in float64; the flags say which optional columns were filled."""
    column = dict(zip(PPO_COLUMNS, table.double().T, strict=True))
    summed = {
        "token_count": column["live"],
        "policy_loss_sum": column["policy_loss"],
        "kl_loss_sum": column["kl_loss"],
        "clip_count": column["clip_low"] + column["clip_high"],
        "clip_low_count": column["clip_low"],
        "clip_high_count": column["clip_high"],
        "dual_clip_count": column["dual_clip"],
        "ratio_sum": column["ratio"],
        "ratio_sq_sum": column["ratio"].square(),
        "old_k1_sum": -column["log_ratio"],
        "old_k2_sum": 0.5 * column["log_ratio"].square(),
        "old_k3_sum": column["old_k3"],
        "logprob_sum": column["logprob"],
    }
    largest = {"ratio_max": column["ratio"]}
    if entropy:
        summed["entropy_sum"] = column["entropy"]
    if reference:
        summed["ref_k1_sum"], summed["ref_k3_sum"] = column["ref_k1"], column["ref_k3"]
        summed["ref_k2_sum"] = 0.5 * column["ref_k1"].square()
    if sampler:
        summed["gap_sum"] = largest["gap_max"] = column["gap"]
    return column["loss"].sum().to(table.dtype), _reduced(summed, largest)


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


def value_sums(table: Tensor) -> tuple[Tensor, Stats]:
    """(loss (), stats) of a value table, summed in float64."""
    column = dict(zip(VALUE_COLUMNS, table.double().T, strict=True))
    summed = {
        "token_count": column["live"],
        "value_loss_sum": column["loss"],
        "value_clip_count": column["clipped"],
        "value_sum": column["value"],
        "value_sq_sum": column["value"].square(),
        "error_sq_sum": column["error_sq"],
        "return_sum": column["return"],
        "return_sq_sum": column["return"].square(),
    }
    return column["loss"].sum().to(table.dtype), _reduced(summed, {})


def _reduced(summed: Stats, largest: Stats) -> Stats:
    """Each (R,) column to its sum, or to its maximum; 0 where R = 0."""
    sums = torch.stack(list(summed.values())).sum(1)
    maxima = {name: F.pad(column, (0, 1)).amax() for name, column in largest.items()}
    return dict(zip(summed, sums.unbind(), strict=True)) | maxima
