"""What a decoder's layers compute between their products, one pass over memory each: float32 on the CPU, in C++.

PyTorch makes a tensor of every step: six for a norm, eight for the rotation of queries. torch.compile does not trace
these: it makes kernels of its own.
"""

from typing import Any

import torch
from torch import Tensor

from fastppo_kernels import native
from fastppo_kernels.checks import check_shape
from fastppo_kernels.operators.scale import differentiated_once


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis (arXiv:1910.07467).

    Args:
        x: (..., H) float32. weight: (H,).

    Raises:
        ValueError: a shape, a dtype or a device does not fit.
    """
    _check(x=x, weight=weight)
    check_shape((x.shape[-1],), "(H,)", weight=weight)
    rows, weight = x.reshape(-1, x.shape[-1]).contiguous(), weight.contiguous()
    return _apply(_RMSNorm, native.rms_norm, rows, weight, eps).view(x.shape)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (SwiGLU, arXiv:2002.05202), of one shape, float32.

    Raises:
        ValueError: a shape, a dtype or a device does not fit.
    """
    _check(gate=gate, up=up)
    check_shape(tuple(gate.shape), "that of gate", up=up)
    return _apply(_Gated, native.gated, gate.contiguous(), up.contiguous())


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (RoPE, arXiv:2104.09864): x cos + (-x2, x1) sin, for (x1, x2) the halves of x.

    Args:
        x: (N, heads, D) float32, D even; rows and heads any distance apart. cos, sin: (N, D), which get no gradient.

    Returns:
        (N, heads, D), contiguous.

    Raises:
        ValueError: a shape, a dtype or a device does not fit.
    """
    _check(x=x, cos=cos, sin=sin)
    if x.ndim != 3 or x.shape[2] % 2:
        raise ValueError(f"x must be (N, heads, D) with an even D, got {tuple(x.shape)}")
    check_shape((x.shape[0], x.shape[2]), "(N, D)", cos=cos, sin=sin)
    x = x if x.stride(2) == 1 else x.contiguous()
    return _apply(_Rotate, _rotated, x, cos.contiguous(), sin.contiguous())


def _check(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.dtype != torch.float32 or not x.is_cpu or type(x) not in (Tensor, torch.nn.Parameter):  # fake: no memory
            found = f"a {type(x).__name__} of {x.dtype} on {x.device}"
            raise ValueError(f"{name} must be a float32 tensor on the CPU, got {found}: compute it with PyTorch")


def _apply(function: Any, forward: Any, *args: Any) -> Any:
    """The forward alone where no gradient can be asked for: a decoded token is little work, and calls add up."""
    if torch.is_grad_enabled():
        return function.apply(*args)
    out = forward(*args)
    return out[0] if isinstance(out, tuple) else out


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return native.rotate(x, cos, sin, back=False)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, rates = native.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, rates)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        differentiated_once(grads[0])
        return *native.rms_norm_backward(grads[0].contiguous(), *ctx.saved_tensors), None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return native.gated(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        differentiated_once(grads[0])
        return native.gated_backward(grads[0].contiguous(), *ctx.saved_tensors)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        differentiated_once(grads[0])
        dout = grads[0] if grads[0].stride(2) == 1 else grads[0].contiguous()
        return native.rotate(dout, *ctx.saved_tensors, back=True), None, None
