"""Packed attention: all sequences of a micro-batch in one row, and never a dense (N, N) mask.

No sequence is padded to the length of another. On a CPU a few tokens more make a row's length one that recurs.

Registered with transformers' attention interface under the name `fastppo_packed`. `backend()` is the dispatch: the
`flash_attn` package when installed, else PyTorch's own varlen FlashAttention, both for half precision on CUDA;
fastppo's kernel for float32 on a CPU; all else (half precision there, float32 on CUDA, a soft-cap without flash_attn)
runs SDPA on sequences of like length, padded to the longest of them.
"""

import functools
import importlib.util
import inspect
import os
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
from fastppo_kernels import packed_attention as native_attention
from fastppo_kernels.backend import BACKEND_VARIABLE

PACKED = "fastppo_packed"
UNTRACED = "fastppo_untraced"  # the same, in compiled layers
Backend = Literal["flash_attn", "torch_varlen", "native", "sdpa"]
# Scores of padding that take as long as another call. CPU, measured: 60 us, at 25 ns for 4 heads of 32 on one core. The
# other is an estimate: 10 us of a GPU's float32 rate.
CALL_SCORES = {"cpu": 2400}
CALL_SCORES_ELSEWHERE = 1 << 17
HAS_FLASH_ATTN = importlib.util.find_spec("flash_attn") is not None


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a packed row begin and end, made once per micro-batch and shared by all layers.

    Behind the N tokens there may be `padding`, each token of it a sequence of its own; it is in the buckets and in
    `padded_seqlens`, not in `cu_seqlens`.
    """

    cu_seqlens: Tensor  # (B + 1,) int32
    padded_seqlens: Tensor  # (B + padding + 1,) int32
    max_seqlen: int
    padding: int  # tokens
    buckets: tuple[tuple[int, int], ...]  # sequences of like length as rows, padded to the longest: (b, T) of each
    # The token at each place of the buckets' rows, bucket after bucket, (P,) int64: the tail of a short row repeats its
    # last token. None: the packed row itself is the one bucket, of equal lengths.
    spread: Tensor | None
    restore: Tensor | None  # (N + padding,) int64, the reverse: the place of each token


class Memory(Protocol):
    """Keys and values of earlier tokens, for sampling."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None,
        softcap: float | None,
    ) -> Tensor | None:  # fmt: skip
        """Take the keys and values of new tokens, (N, kv_heads, D); returns what their queries find, (N, heads, D), or
        None where the tokens attend to each other alone."""
        ...


def plan(
    lengths: Sequence[int], device: torch.device | str = "cpu", *, recurring: bool = False, runs_on: str | None = None
) -> Packing:
    """Plan packed attention for sequences of the given lengths, each >= 1.

    Args:
        device: where the tensors of the plan go.
        recurring: on a CPU, whose bfloat16 kernels are made for a number of tokens, pad to one that others have too.
        runs_on: type of the device that computes; default: of `device`.
    """
    sizes, runs_on, cu_seqlens = torch.tensor(lengths), runs_on or torch.device(device).type, cumulative(lengths)
    total, longest = int(sizes.sum()), int(sizes.max())
    padding = common_size(total) - total if recurring and runs_on == "cpu" else 0
    if padding:
        sizes = torch.cat([sizes, sizes.new_ones(padding)])
    elif (sizes == longest).all():
        cu_seqlens = cu_seqlens.to(device)
        return Packing(cu_seqlens, cu_seqlens, longest, 0, ((len(sizes), longest),), None, None)
    order = sizes.argsort(descending=True)
    buckets = tuple(_buckets(sizes[order].tolist(), CALL_SCORES.get(runs_on, CALL_SCORES_ELSEWHERE)))
    width = torch.cat([torch.full((b,), T) for b, T in buckets])
    row = torch.arange(len(order)).repeat_interleave(width)
    column, member = torch.arange(len(row)) - (width.cumsum(0) - width)[row], order[row]
    spread = (sizes.cumsum(0) - sizes)[member] + torch.minimum(column, sizes[member] - 1)
    real = (column < sizes[member]).nonzero().squeeze(1)
    restore = torch.empty(len(real), dtype=torch.int64).scatter_(0, spread[real], real)
    padded_seqlens = (cumulative(sizes) if padding else cu_seqlens).to(device)
    return Packing(
        cu_seqlens.to(device), padded_seqlens, longest, padding, buckets, spread.to(device), restore.to(device)
    )


def common_size(n: int) -> int:
    """n or a little more: the next multiple of 8 that has five significant bits.

    oneDNN, which multiplies bfloat16 on a CPU, makes a kernel for every shape that it meets, in 0.1 to 0.4 ms each, and
    keeps the last 1024.
    """
    return n + -n % max(8, 1 << max(0, n.bit_length() - 5))


def padded(tokens: Tensor, packing: Packing) -> Tensor:
    """(N,) ids or positions and `packing.padding` more: the first one's, which is read anyway, so no other is."""
    return torch.cat([tokens, tokens[:1].expand(packing.padding)]) if packing.padding else tokens


def _buckets(falling: Sequence[int], spare: int) -> Iterator[tuple[int, int]]:
    """Rows and columns of each bucket: a new one where padding to the longest would be more than `spare` scores."""
    first = wasted = 0
    for i, length in enumerate(falling):
        wasted += falling[first] ** 2 - length**2
        if wasted > spare:
            yield i - first, falling[first]
            first, wasted = i, 0
    yield len(falling) - first, falling[first]


def backend(device: torch.device, dtype: torch.dtype, softcap: float | None) -> Backend:
    """Which implementation runs: the whole dispatch rule, but that `native` leaves values of another width or dtype
    than their queries to `sdpa`."""
    if device.type == "cpu" and dtype == torch.float32 and softcap is None:
        return "native" if os.environ.get(BACKEND_VARIABLE) in (None, "", "native") else "sdpa"
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
    if chosen == "native" and (v.shape[2], v.dtype) == (q.shape[2], q.dtype):  # else SDPA, which takes other values too
        return native_attention(q, k, v, packing.padded_seqlens, scale=scaling, window=window)[None], None
    return _bucketed(q, k, v, packing, scaling, window, softcap)[None], None


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


def _bucketed(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, scaling: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """Rows are right-padded, so causality alone keeps real queries off the padding."""
    if packing.spread is not None and packing.restore is not None:
        q, k, v = (_Spread.apply(x, packing.spread, packing.restore) for x in (q, k, v))
    sizes = [b * T for b, T in packing.buckets]
    pieces = zip(packing.buckets, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
    made = [_rows_attention(shape, q, k, v, scaling, window, softcap) for shape, q, k, v in pieces]
    out = made[0] if len(made) == 1 else torch.cat(made)
    return out if packing.restore is None else _Restore.apply(out, packing.restore)


def _rows_attention(
    shape: tuple[int, int], q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    """(b * T, heads, D) of a bucket, whose shape is (b, T)."""
    T = shape[1]
    q, k, v = (x.reshape(*shape, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))  # (b, heads, T, D)
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


class _Spread(torch.autograd.Function):
    """Tokens (N, ...) at the places of the buckets' rows (P, ...).

    A token that is repeated gets its gradient from its own place alone: no real query sees the others, so theirs is 0.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, spread: Tensor, restore: Tensor) -> Tensor:
        ctx.save_for_backward(restore)
        return x.index_select(0, spread)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, *ctx.saved_tensors), None, None


class _Restore(torch.autograd.Function):
    """The reverse: of the places (P, ...) those of the tokens (N, ...)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, restore: Tensor) -> Tensor:
        ctx.save_for_backward(restore)
        ctx.places = x.shape[0]
        return x.index_select(0, restore)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (restore,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.places, *grads[0].shape[1:]).index_copy_(0, restore, grads[0]), None


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
