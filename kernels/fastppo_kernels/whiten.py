"""Whitening over the valid tokens of the whole batch, on every rank alike.

whitened = (x - mean) * rsqrt(var + 1e-8)  [+ mean],  var = mean of (x - mean)^2
"""

from typing import Any

import torch
from torch import Tensor

from fastppo_kernels import checks
from fastppo_kernels.reference import WHITEN_EPS, working_dtype


def whiten(values: Tensor, mask: Tensor | None = None, *, shift_mean: bool = True, group: Any = None) -> Tensor:
    """Values scaled to variance 1 and, with shift_mean, shifted to mean 0; no gradient.

    Two passes with float64 sums: the mean square of what is left after the mean is taken off cannot cancel, so equal
    float32 values become exactly 0, not infinity. The variance is the biased one (divided by n).

    Args:
        values: float, any shape.
        mask: bool, the shape of `values`, True on valid tokens; None: all are.
        shift_mean: False keeps the mean, as rewards need; advantages are shifted.
        group: torch.distributed process group whose ranks are whitened as one batch (two all-reduces, which every rank
            must reach, also one without valid tokens); None: this process alone.

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
    with torch.no_grad():
        x = values.double()
        live = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
        totals = torch.stack([torch.where(live, x, 0).sum(), live.sum().double()])
        total, count = _over_group(totals, group).unbind()
        mean = total / count.clamp(min=1)
        centred = torch.where(live, x - mean, 0)
        variance = _over_group(centred.square().sum(), group) / count.clamp(min=1)
        whitened = centred * torch.rsqrt(variance + WHITEN_EPS) + (0 if shift_mean else mean)
        return torch.where(live, whitened, 0).to(working_dtype(values))


def _over_group(x: Tensor, group: Any) -> Tensor:
    if group is not None and torch.distributed.is_initialized():
        torch.distributed.all_reduce(x, group=group)
    return x
