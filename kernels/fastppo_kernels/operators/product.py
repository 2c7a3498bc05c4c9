"""A matrix product of float32 tensors on the CPU, for whoever has to see it: a checkpoint that keeps results, say."""

import torch
from torch import Tensor

from fastppo_kernels import native


@torch.library.custom_op("fastppo::product", mutates_args=())
def product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """a @ b.T + bias: a transposed view would be a result of its own to them.

    Not differentiable: `linear` and the heads, which call it, have backwards of their own.
    """
    return native.matmul(a, b.T, bias)


@product.register_fake
def _(a, b, bias):
    return a.new_empty(a.shape[0], b.shape[0])
