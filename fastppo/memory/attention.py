"""What a GPU does and this machine may not: FlashAttention and copies to the host, as dry runs of memory see them.

Attention is registered as `fastppo_outline`, FlashAttention, and `fastppo_ungrouped`, what runs on a GPU instead of it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AttentionInterface, PreTrainedModel

from fastppo.attention import Memory, Packing, packed_attention

OUTLINE, UNGROUPED = "fastppo_outline", "fastppo_ungrouped"


@torch.library.custom_op("fastppo_outline::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; an operator, so that selective checkpointing can keep them."""
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)


_attention.register_fake(lambda q, k, v: (torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)))


class _Flash(torch.autograd.Function):
    """Keeps its inputs, its output and a float32 per query and head; the backward adds up dq in float32, elsewhere if
    they are not."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = _attention(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        q, k, v = ctx.saved_tensors[:3]
        sums = None if q.dtype == torch.float32 else q.new_empty(q.shape, dtype=torch.float32)
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


def ungrouped_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, N, D)
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    memory: Memory | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """`packed_attention` by SDPA as on a GPU, where keys and values are repeated for all heads that share them."""
    if memory is not None:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        out = memory.attend(module.layer_idx, q, k, v, None, None, softcap)  # pyright: ignore
        if out is not None:
            return out[None], None
    if softcap is None:  # else they are repeated anyway
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return packed_attention(module, query, key, value, attention_mask, *args, softcap=softcap, **others)


AttentionInterface.register(OUTLINE, outline_attention)
AttentionInterface.register(UNGROUPED, ungrouped_attention)


def elsewhere(model: PreTrainedModel) -> None:
    """As `layers.offload_activations` does it: what a checkpointed layer is computed again from takes no memory here
    until then."""
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = _offloaded(module._gradient_checkpointing_func)  # pyright: ignore


def _offloaded(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(lambda x: (x.shape, x.dtype), lambda what: torch.empty(what[0], dtype=what[1])):
            return checkpoint(*args, **kwargs)

    return call
