"""The critic's loss, with the value clipped around its old value, from values or from hidden states and a value head.

loss = sum_i weights_i * 0.5 * max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2)
"""

import math

import torch
from torch import Tensor

from fastppo_kernels import checks, operators
from fastppo_kernels.backend import choose_backend
from fastppo_kernels.stats import Stats
from fastppo_kernels.table import value_stats


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    weights: Tensor,
    *,
    clip: float | None = 0.2,
    backend: str | None = None,
) -> tuple[Tensor, Stats]:
    """The critic's loss of R tokens and its statistics; differentiable in values, all else is constant.

    Args:
        values: (R,) float, the critic's values now.
        old_values: (R,) float, its values when the batch was scored.
        returns: (R,) float, advantage (before whitening) plus old value.
        weights: (R,) float. A row of weight 0 contributes nothing, not even a NaN.
        clip: how far a value may move from its old value; > 0. None or math.inf: no clip.
        backend: "triton", "native" or "reference"; None lets `choose_backend` decide.

    Returns:
        loss: () float32, float64 for float64 values.
        stats: 0-d float64 tensors over the rows with a weight, additive (see `merge_stats`): token_count,
            value_loss_sum (weighted), value_clip_count (the clipped square is strictly larger), value_sum,
            value_sq_sum, error_sq_sum (of (v - R)^2), return_sum, return_sq_sum.

    Raises:
        ValueError: shapes or dtypes do not fit together, or clip is not > 0.
    """
    checks.check_rows(values.shape[0] if values.ndim else -1, values=values)
    checks.check_rows(values.shape[0], old_values=old_values, returns=returns, weights=weights)
    checks.check_device(values=values, old_values=old_values, returns=returns, weights=weights)
    name = choose_backend("value_loss", backend, values)
    loss, _, sums = operators.value(values, old_values, returns, weights, _check_clip(clip), name)
    return loss, value_stats(sums.detach())


def linear_value_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    old_values: Tensor,
    returns: Tensor,
    weights: Tensor,
    *,
    clip: float | None = 0.2,
    backend: str | None = None,
) -> tuple[Tensor, Stats]:
    """`value_loss` of the values hidden @ weight + bias, made in float32 whatever the dtype of hidden.

    Args:
        hidden: (R, H) float; differentiable.
        weight: (H,) float, the value head; differentiable.
        bias: one number, () or (1,) float, or None; differentiable.
        All others: as in `value_loss`.

    Returns:
        (loss, stats) as in `value_loss`.

    Raises:
        ValueError: shapes or dtypes do not fit together, clip is not > 0, or a gradient of a float16 tensor is wanted,
            which would be rounded before a loss scale reaches it.
    """
    checks.check_float(hidden=hidden, weight=weight, bias=bias)
    if hidden.ndim != 2 or weight.shape != hidden.shape[1:]:
        raise ValueError(
            "hidden must be (R, H) and weight (H,), "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}; flatten a (1, H) weight with .flatten()"
        )
    if bias is not None and bias.numel() != 1:
        raise ValueError(f"bias must be one number, got shape {tuple(bias.shape)}; pass None for no bias")
    checks.check_rows(hidden.shape[0], old_values=old_values, returns=returns, weights=weights)
    like = {"old_values": old_values, "returns": returns, "weights": weights}
    checks.check_device(hidden=hidden, weight=weight, bias=bias, **like)
    checks.check_gradient_dtype(hidden=hidden, weight=weight, bias=bias)
    name = choose_backend("linear_value_loss", backend, hidden)
    wanted = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in (hidden, weight, bias)]
    rows = (old_values, returns, weights, _check_clip(clip))
    loss, _, sums, *_ = operators.linear_value(hidden, weight, bias, *rows, wanted, name)
    return loss, value_stats(sums.detach())


def _check_clip(clip: float | None) -> float | None:
    if clip is not None and not clip > 0.0:
        raise ValueError(f"clip must be > 0, got {clip}; pass None for no clip")
    return None if clip == math.inf else clip
