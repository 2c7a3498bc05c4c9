"""Packed attention: all sequences of a micro-batch in one row, no padding, and never a dense (N, N) mask.

Registered with transformers' attention interface under the name `fastppo_packed`. `backend()` is the dispatch: the
`flash_attn` package when installed, else PyTorch's own varlen FlashAttention, both for half precision on CUDA; all
else (CPU, float32, a soft-cap without flash_attn) runs SDPA on sequences of like length, padded to the longest of them.
"""

import functools
import importlib.util
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from fastppo.batch import cumulative
from fastppo.checks import InputError

PACKED = "fastppo_packed"
UNTRACED = "fastppo_untraced"  # the same, in compiled layers
Backend = Literal["flash_attn", "torch_varlen", "sdpa"]
HAS_FLASH_ATTN = importlib.util.find_spec("flash_attn") is not None


@dataclass(frozen=True)
class Bucket:
    """Sequences of like length as rows of positions; the tail of a short row repeats its last position."""

    index: Tensor  # (b, T) int64
    whole: bool  # the bucket is the packed row itself: one bucket, equal lengths


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a packed row begin and end, made once per micro-batch and shared by all layers."""

    cu_seqlens: Tensor  # (b + 1,) int32
    max_seqlen: int
    buckets: tuple[Bucket, ...]
    restore: Tensor | None  # (N,) int64, where each token stands in the buckets' rows one after the other; None: there


class Memory(Protocol):
    """Keys and values of earlier tokens, for sampling."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None,
        softcap: float | None,
    ) -> Tensor | None:  # fmt: skip
        """Take the keys and values of new tokens, (N, kv_heads, D); returns what their queries find, (N, heads, D), or
        None where the tokens attend to each other alone."""
        ...


def plan(lengths: Sequence[int], device: torch.device | str = "cpu") -> Packing:
    """Plan packed attention for sequences of the given lengths, each >= 1: one bucket per power of two."""
    sizes = torch.tensor(lengths)
    starts = sizes.cumsum(0) - sizes
    bucket_of = (sizes - 1).clamp(min=1).log2().floor()
    if sizes.max() <= 2 * sizes.min():  # near enough: one call beats less padding
        bucket_of.zero_()
    buckets, order, places, offset = [], [], [], 0
    for key in bucket_of.unique():
        member = (bucket_of == key).nonzero().squeeze(1)
        column = torch.arange(int(sizes[member].max()))
        index = starts[member, None] + torch.minimum(column, sizes[member, None] - 1)
        real = (column < sizes[member, None]).flatten().nonzero().squeeze(1)
        order.append(index.flatten()[real])
        places.append(real + offset)
        offset += index.numel()
        whole = len(member) == len(sizes) and index.numel() == int(sizes.sum())
        buckets.append(Bucket(index.to(device), whole))
    places = torch.cat(places)
    restore = None if buckets[0].whole else torch.empty_like(places).scatter_(0, torch.cat(order), places).to(device)
    return Packing(cumulative(sizes).to(device), int(sizes.max()), tuple(buckets), restore)


def backend(device: torch.device, dtype: torch.dtype, softcap: float | None) -> Backend:
    """Which implementation runs: the whole dispatch rule."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return "sdpa"
    if HAS_FLASH_ATTN:
        return "flash_attn"
    return "torch_varlen" if softcap is None else "sdpa"  # PyTorch's varlen kernel has no soft-cap


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, N, D)
    key: Tensor,  # (1, kv_heads, N, D)
    value: Tensor,  # (1, kv_heads, N, D)
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: Packing | None = None,
    memory: Memory | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each packed sequence; returns (1, N, heads, D). Dropout is off everywhere in PPO."""
    if (packing is None and memory is None) or attention_mask is not None:
        raise InputError(
            "this model's attention is fastppo's packed one: call it through fastppo.models.hidden_states, or wrap an "
            "ordinary forward in `with fastppo.attention.dense_attention(model):`"
        )
    if others.get("s_aux") is not None:
        raise InputError(f"{type(module).__name__} has attention sinks, which packed attention does not do")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, D)
    if memory is not None:
        out = memory.attend(module.layer_idx, q, k, v, scaling, sliding_window, softcap)  # pyright: ignore
        if out is not None:
            return out[None], None
    assert packing is not None
    chosen = backend(query.device, query.dtype, softcap)
    window = sliding_window if sliding_window is not None and sliding_window < packing.max_seqlen else None
    if chosen == "flash_attn":
        return _flash_attn(q, k, v, packing, scaling, window, softcap)[None], None
    if chosen == "torch_varlen":
        return _torch_varlen(q, k, v, packing, scaling, window)[None], None
    rows = [_bucket_attention(q, k, v, bucket, scaling, window, softcap) for bucket in packing.buckets]
    out = rows[0] if len(rows) == 1 else torch.cat(rows)
    return (out if packing.restore is None else out.index_select(0, packing.restore))[None], None


AttentionInterface.register(PACKED, packed_attention)


@contextmanager
def dense_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within it, `model` runs transformers' own attention: ordinary padded batches and KV caches."""
    before: Any = model.config._attn_implementation
    soft_capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    model.set_attn_implementation("eager" if soft_capped else "sdpa")  # sdpa has no soft-cap
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _flash_attn(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, scaling: float | None, window: int | None, softcap: float | None
) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    cu, n = packing.cu_seqlens, packing.max_seqlen
    left = -1 if window is None else window - 1
    return flash_attn_varlen_func(
        q, k, v, cu, cu, n, n, softmax_scale=scaling, causal=True, window_size=(left, 0), softcap=softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),  # PyTorch's own kernels ask for themselves
    )  # fmt: skip


def _torch_varlen(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, scaling: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    cu, n = packing.cu_seqlens, packing.max_seqlen
    left = -1 if window is None else window - 1
    gqa: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if _varlen_has_grouped_heads():
            gqa = {"enable_gqa": True}
        else:  # torch 2.11's first versions have no grouped heads
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return varlen_attn(q, k, v, cu, cu, n, n, scale=scaling, window_size=(left, 0), **gqa)  # pyright: ignore


@functools.cache
def _varlen_has_grouped_heads() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _bucket_attention(
    q: Tensor, k: Tensor, v: Tensor, bucket: Bucket, scaling: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """Rows are right-padded, so causality alone keeps real queries off the padding. Returns (b * T, heads, D)."""
    b, T = bucket.index.shape
    q, k, v = (_rows(x, bucket).transpose(1, 2) for x in (q, k, v))  # (b, heads, T, D)
    if softcap is not None:
        out = _soft_capped(q, k, v, scaling, window, softcap)
    else:
        mask = None if window is None or window >= T else _causal_mask(T, window, q.device)
        if q.is_cuda:  # there grouped heads would take the kernel that stores all scores
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=gqa
        )
    return out.transpose(1, 2).flatten(0, 1)


def _rows(x: Tensor, bucket: Bucket) -> Tensor:
    """(N, heads, D) -> (b, T, heads, D)."""
    moved = x if bucket.whole else x.index_select(0, bucket.index.flatten())
    return moved.reshape(*bucket.index.shape, *x.shape[1:])


def _causal_mask(T: int, window: int | None, device: torch.device) -> Tensor:
    distance = torch.arange(T, device=device)[:, None] - torch.arange(T, device=device)
    return (distance >= 0) & (distance < (T if window is None else window))


def _soft_capped(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None, softcap: float) -> Tensor:
    """Scores cap * tanh(score / cap), softmax in float32 (Gemma 2, arXiv:2408.00118)."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = (q @ k.transpose(2, 3)) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_causal_mask(q.shape[2], window, q.device), float("-inf"))
    return scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v
