"""Causal attention within packed sequences and its gradients, by the backend of the CPU.

Layers call it so often that dispatch counts: `torch.autograd.Function` around operators without a gradient of their own
takes 45 us less than one that has it.
"""

from typing import Any

import torch
from torch import Tensor

from fastppo_kernels import native
from fastppo_kernels.operators.scale import differentiated_once
from fastppo_kernels.settings import PackedSettings


class PackedAttention(torch.autograd.Function):
    """(N, heads, D) from q, k, v, cu_seqlens, scale and window."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int | None
    ) -> Tensor:
        out, origins = packed_attention(q, k, v, cu_seqlens, scale, window)
        ctx.save_for_backward(q, k, v, cu_seqlens, out, origins)
        ctx.settings = scale, window
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        differentiated_once(grads[0])
        q, k, v, cu_seqlens, out, origins = ctx.saved_tensors
        made = packed_attention_backward(grads[0], q, k, v, cu_seqlens, *ctx.settings, out, origins)
        return *made, None, None, None


@torch.library.custom_op("fastppo::packed_attention", mutates_args=())
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """(N, heads, D), and (2, heads, N) float32 that the gradients need."""
    return native.packed_attention(q, k, v, cu_seqlens, PackedSettings(scale=scale, window=window))


@torch.library.custom_op("fastppo::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int | None, out: Tensor,
    origins: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, contiguous."""
    settings = PackedSettings(scale=scale, window=window)
    return native.packed_attention_backward(dout, q, k, v, cu_seqlens, settings, out, origins)


@packed_attention.register_fake
def _(q, k, v, cu_seqlens, scale, window):
    return q.new_empty(q.shape), q.new_empty(2, q.shape[1], q.shape[0])


@packed_attention_backward.register_fake
def _(dout, q, k, v, cu_seqlens, scale, window, out, origins):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))
