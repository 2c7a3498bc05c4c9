"""Whitening over the valid tokens of the whole batch, on every rank alike.

whitened = (x - mean) * rsqrt(var + 1e-8)  [+ mean],  var = mean of (x - mean)^2
"""

from typing import Any

import torch
from torch import Tensor

from fastppo_kernels import checks, operators
from fastppo_kernels.backend import choose_backend
from fastppo_kernels.reference import WHITEN_EPS, working_dtype


def whiten(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """Values scaled to variance 1 and, with shift_mean, shifted to mean 0; no gradient.

    Two passes with float64 sums: the mean square of what is left after the mean is taken off cannot cancel, so equal
    float32 values become exactly 0, not infinity. The variance is the biased one (divided by n).

    Args:
        values: float, any shape.
        mask: bool, the shape of `values`, True on valid tokens; None: all are.
        shift_mean: False keeps the mean, as rewards need; advantages are shifted.
        group: torch.distributed process group whose ranks are whitened as one batch (one gathering of three numbers,
            which every rank must reach, also one without valid tokens); None: this process alone.
        backend: "triton", "native" or "reference"; None lets `choose_backend` decide.

    Returns:
        The shape of `values`, float32 (float64 for float64), 0 where `mask` is False.

    Raises:
        ValueError: `values` is not floating point, or `mask` is not bool of its shape.
    """
    checks.check_float(values=values)
    if mask is not None and (mask.dtype != torch.bool or mask.shape != values.shape):
        raise ValueError(
            f"mask must be bool of shape {tuple(values.shape)}, got {mask.dtype} {tuple(mask.shape)}; write `mask != 0`"
        )
    checks.check_device(values=values, mask=mask)
    with torch.no_grad():
        (flat,) = checks.in_working_dtype(values.flatten())
        name = choose_backend("whiten", backend, flat)
        mean, variance = _over_group(operators.moments(flat, _flat(mask), name), group)
        whitened = (values.double() - mean) * torch.rsqrt(variance + WHITEN_EPS) + (0 if shift_mean else mean)
        return (whitened if mask is None else torch.where(mask, whitened, 0)).to(working_dtype(values))


def _flat(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.flatten()


def _over_group(moments: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of all ranks from the (3,) moments of each, merged in rank order (Chan et al. 1979)."""
    parts = [moments]
    if group is not None and torch.distributed.is_initialized():
        parts = [torch.empty_like(moments) for _ in range(torch.distributed.get_world_size(group))]
        torch.distributed.all_gather(parts, moments, group=group)
    count, mean, deviation = torch.stack(parts).unbind(1)
    total = count.sum().clamp(min=1)
    overall = (count * mean).sum() / total
    return overall, (deviation + count * (mean - overall).square()).sum() / total
