"""The memory of a GPU's FlashAttention, for dry runs on machines without one: registered as `fastppo_outline`."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from fastppo.attention import Memory, Packing

OUTLINE = "fastppo_outline"


class _Flash(torch.autograd.Function):
    """Keeps its inputs, its output and a float32 per query and head; the backward adds up dq in float32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:2], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        q, k, v = ctx.saved_tensors[:3]
        sums = q.new_empty(q.shape, dtype=torch.float32)
        made = tuple(torch.empty_like(x) for x in (q, k, v))
        del sums
        return made


def outline_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, N, D)
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packing: Packing | None = None,
    memory: Memory | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What `packed_attention` takes where FlashAttention runs; no number in it means anything."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if memory is not None:
        out = memory.attend(module.layer_idx, q, k, v, scaling, sliding_window, softcap)  # pyright: ignore
        if out is not None:
            return out[None], None
    return _Flash.apply(q, k, v)[None], None  # pyright: ignore[reportOptionalSubscript]


AttentionInterface.register(OUTLINE, outline_attention)
