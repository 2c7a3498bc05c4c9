"""Matrix products with a weight: float32 on the CPU in C++, everything else by PyTorch.

    y = x W^T + b      dx = dy W      dW = dy^T x      db = sum of dy over rows

In C++ a row's bits depend on that row and the weight alone: not on how many rows there are, nor on how many
threads. So a sequence is scored alike in every micro-batch.
"""

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastppo_kernels import native, operators
from fastppo_kernels.checks import check_device, check_shape


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias: C++ for float32 on the CPU, `torch.nn.functional.linear` for everything else.

    Args:
        x: (..., H). weight: (V, H), same dtype. bias: (V,) or None.

    Returns:
        (..., V) in the dtype of `x`, differentiable in all three.
    """
    if not _goes_to_native(x, weight, bias):
        if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:  # PyTorch says less
            check_shape((weight.shape[0], x.shape[-1]), "(V, H)", weight=weight)
        if weight.device != x.device or (bias is not None and bias.device != x.device):
            check_device(x=x, weight=weight, bias=bias)
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    made = _Linear.apply(rows, weight, bias) if torch.is_grad_enabled() else product(rows, weight, bias)
    return made.view(*x.shape[:-1], weight.shape[0])


def _goes_to_native(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether all is legal and in C++; few words, as the weights of a decoded token have emptied the caches."""
    return (
        x.dtype is torch.float32
        and weight.dtype is torch.float32
        and x.is_cpu
        and weight.is_cpu
        and x.numel() > 0
        and weight.numel() > 0
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1]
        and (bias is None or (bias.dtype is torch.float32 and bias.is_cpu and bias.shape == weight.shape[:1]))
        and os.environ.get("FASTPPO_BACKEND") != "reference"
        and not torch.is_autocast_enabled("cpu")
    )


def runs_native(*operands: Tensor) -> bool:
    """Whether `native.matmul` multiplies these."""
    known = all(x.is_cpu and x.dtype in (torch.float32, torch.bfloat16) for x in operands)
    return known and os.environ.get("FASTPPO_BACKEND") != "reference"


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b.T + bias in C++: float32 on the CPU, a (M, K) and b (N, K) of any strides, bias (N,)."""
    if operators.looked_at(a, b):
        return operators.product(a, b, bias)
    return native.matmul(a, b.T, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (dy,), (x, weight) = grads, ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        if torch.is_grad_enabled():  # of this gradient another one is wanted; `product` is not known to autograd
            dx = _Linear.apply(dy, weight.T, None) if need_x else None
            dweight = _Linear.apply(dy.T, x.T, None) if need_weight else None
        else:
            dx = product(dy, weight.T) if need_x else None
            dweight = product(dy.T, x.T) if need_weight else None
        return dx, dweight, dy.sum(0) if need_bias else None
