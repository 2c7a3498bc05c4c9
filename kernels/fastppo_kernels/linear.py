"""Matrix products with a weight, through oneDNN where that is faster than the BLAS that `torch.mm` calls.

    y = x W^T + b      dx = dy W      dW = dy^T x      db = sum of dy over rows

oneDNN generates AVX-512 code on every vendor's CPU, MKL's only on Intel's: 229 against 105 GFLOP/s at (256, 128) x
(128, 16384), 263 against 118 at (1024, 128) x (128, 512), float32 on one core of an AMD EPYC with torch 2.13.
"""

import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastppo_kernels import native
from fastppo_kernels.checks import check_device, check_shape

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
TILE_BYTES = 1 << 20  # of one result of `product`, which is new memory: so much stays in the cache of a core


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias: oneDNN for float32 on the CPU, `torch.nn.functional.linear` for everything else.

    Args:
        x: (..., H). weight: (V, H), same dtype. bias: (V,) or None.

    Returns:
        (..., V) in the dtype of `x`, differentiable in all three.
    """
    if not _goes_to_onednn(x, weight, bias):
        if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:  # PyTorch says less
            check_shape((weight.shape[0], x.shape[-1]), "(V, H)", weight=weight)
        if weight.device != x.device or (bias is not None and bias.device != x.device):
            check_device(x=x, weight=weight, bias=bias)
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return product(x, weight, bias)
    return _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


def _goes_to_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether all is legal and `runs_onednn`; few words, as the weights of a decoded token have emptied the caches."""
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
        and _allows_onednn()
        and not torch.is_autocast_enabled("cpu")
    )


def runs_onednn(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether products of `x` in this dtype go to oneDNN."""
    return x.is_cpu and dtype == torch.float32 and _allows_onednn()


def _allows_onednn() -> bool:
    return HAS_ONEDNN and os.environ.get("FASTPPO_BACKEND") != "reference"


def common_size(n: int) -> int:
    """n or a little more: the next multiple of 8 that has five significant bits.

    oneDNN makes a kernel for every shape that it meets, in 0.1 to 0.4 ms each, and keeps the last 1024.
    """
    return n + -n % _step(n)


def common_floor(n: int) -> int:
    """n or a little less, 8 at least: the same downwards."""
    return max(8, n - n % _step(n))


def _step(n: int) -> int:
    """What lies between two of them where n is."""
    return max(8, 1 << max(0, n.bit_length() - 5))


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b.T (+ bias) by oneDNN; float32 on the CPU, a (..., K), b (N, K), transposed views allowed."""
    if torch.compiler.is_compiling():
        return _whole_product(a, b, bias)
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


@torch.library.custom_op("fastppo::product", mutates_args=())
def _whole_product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """`product`, which Inductor does not look into: it takes oneDNN's operator for one with a constant weight."""
    return product(a, b, bias)


@_whole_product.register_fake
def _(a, b, bias):
    return a.new_empty(*a.shape[:-1], b.shape[0])


def product_into(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> None:
    """out = a @ b.T (+ bias), a tile of columns at a time; out (M, N), a (M, K), b (N, K) of any dtype, bias (N,)."""
    for tile in _tiles(b.shape[0], a.shape[0]):
        out[:, tile] = product(a, b[tile].to(a.dtype), None if bias is None else bias[tile])


def product_over(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed over a tile of rows of b at a time; a (M, N), b (N, K) of any dtype."""
    made = a.new_zeros(a.shape[0], b.shape[1])
    for tile in _tiles(b.shape[0], b.shape[1]):
        made += product(a[:, tile].contiguous(), b[tile].to(a.dtype).T)
    return made


def product_tiles(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """a.T @ b, a tile of its rows at a time, contiguous; a (M, N), b (M, K)."""
    b = b.T.contiguous()
    for tile in _tiles(a.shape[1], b.shape[0]):
        made = product(b, a[:, tile].contiguous().T)  # (K, tile); oneDNN is slow on rows with gaps between them
        yield tile, made.T.contiguous()  # to add a transposed view takes four times as long


def _tiles(length: int, other: int) -> Iterator[slice]:
    """Slices of 0..length such that float32 (slice, other) has about TILE_BYTES; whole cache lines but the last."""
    step = max(64, TILE_BYTES // (4 * other) // 64 * 64)
    return (slice(start, start + step) for start in range(0, length, step))


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
            dweight = _weight_gradient(dy, x) if need_weight else None
        return dx, dweight, dy.sum(0) if need_bias else None


def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dy.T @ x. oneDNN reads the second operand of a product transposed, not the first: the narrower one is that."""
    if dy.shape[1] <= x.shape[1]:
        return product(transposed(dy), x.T)
    return transposed(product(transposed(x), dy.T))


def transposed(x: Tensor) -> Tensor:
    """(C, R) contiguous of a float32 x (R, C) on the CPU."""
    if type(x) is not Tensor or torch.compiler.is_compiling():  # fake: it has no memory
        return x.T.contiguous()
    return native.transposed(x if x.stride(1) == 1 else x.contiguous())
