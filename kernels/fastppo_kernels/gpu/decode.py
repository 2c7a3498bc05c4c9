"""Attention of one new token per sequence to the keys and values before it, which lie in rows of memory.

One program per sequence, head of keys and CHUNK of positions. It reads the live keys and values of its chunk once, for
all query heads that share them, and keeps a softmax of its own; a second kernel joins the chunks of a head. Chunks lie
where they lie whatever the batch, so a sequence's result depends neither on its neighbours nor on their number. The
program whose chunk holds the new token also writes its key and value, and takes them from its registers.

Lengths are read on the device: a CUDA graph of the launch serves every step of a batch. Programs of chunks that nobody
lives in end at once.
"""

# pyright: reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo_kernels.gpu.launch import ROW_DTYPES, check_device, on_device, options, warp_size
from fastppo_kernels.gpu.maths import LOG2E, tanh
from fastppo_kernels.settings import DecodeSettings

CHUNK = 512  # positions of a program
TILE = 8192  # elements of keys, or of values, that a step reads; two steps of both are in flight
EXACT_TILE = 2048  # in float32, whose products take no tensor core and many registers
LEAST_QUERIES = 16  # rows that the tensor cores' product takes


@triton.jit
def _attend(
    q_ptr,  # (n, heads, D)
    k_ptr,  # (n, kv_heads, D)
    v_ptr,
    keys_ptr,  # (rows, kv_heads, positions, D)
    values_ptr,
    positions_ptr,  # (n,) int64
    out_ptr,  # (n, heads, D): the result if there is one chunk, else unused
    parts_ptr,  # (n, heads, chunks, D) float32: of each chunk, relative to its maximum
    stats_ptr,  # (n, heads, chunks, 2) float32: maximum of the scores in units of log2, sum of the weights
    q_stride,
    kv_stride,
    row_stride,
    head_stride,
    scale,
    cap,
    window,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    CAPPED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    row, head, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions_ptr + row).to(tl.int32)
    first = tl.maximum(position + 1 - window, 0)
    begin = tl.maximum(chunk * CHUNK, first // BLOCK * BLOCK)
    end = tl.minimum((chunk + 1) * CHUNK, position + 1)
    if begin < end:
        g, d, t = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK)
        in_d = d < D
        in_q = (g < G)[:, None] & in_d[None, :]
        q_at = row * q_stride + (head * G + g)[:, None] * D + d[None, :]
        q = tl.load(q_ptr + q_at, mask=in_q, other=0.0)
        new_k = tl.load(k_ptr + row * kv_stride + head * D + d, mask=in_d, other=0.0)
        new_v = tl.load(v_ptr + row * kv_stride + head * D + d, mask=in_d, other=0.0)
        memory = row * row_stride + head.to(tl.int64) * head_stride
        if end == position + 1:
            place = memory + position.to(tl.int64) * D + d
            tl.store(keys_ptr + place, new_k, mask=in_d)
            tl.store(values_ptr + place, new_v, mask=in_d)
        top = tl.full((BLOCK_G,), -float("inf"), tl.float32)
        mass = tl.zeros((BLOCK_G,), tl.float32)
        sums = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
        for start in tl.range(begin, end, BLOCK, num_stages=2):
            at = start + t
            place = memory + at.to(tl.int64)[:, None] * D + d[None, :]
            # The new token's place may not be written yet; those before the window may hold NaN.
            old = ((at >= first) & (at < position))[:, None] & in_d[None, :]
            is_new = (at == position)[:, None]
            k = tl.where(is_new, new_k[None, :], tl.load(keys_ptr + place, mask=old, other=0.0))
            v = tl.where(is_new, new_v[None, :], tl.load(values_ptr + place, mask=old, other=0.0))
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            if CAPPED:
                scores = cap * tanh(scores, -2.0 * LOG2E / cap, ACCURATE=True)
            scores = tl.where((at >= first) & (at <= position), scores * LOG2E, -float("inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))  # finite: every block holds a live position
            weights = tl.exp2(scores - new_top[:, None])
            kept = tl.exp2(top - new_top)
            mass = mass * kept + tl.sum(weights, axis=1)
            sums = sums * kept[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            top = new_top
        if WHOLE:
            tl.store(out_ptr + q_at, sums / mass[:, None], mask=in_q)
        else:
            part = ((row * tl.num_programs(1) + head) * G + g) * tl.num_programs(2) + chunk
            tl.store(parts_ptr + part[:, None] * D + d[None, :], sums, mask=in_q)
            tl.store(stats_ptr + part * 2, top, mask=g < G)
            tl.store(stats_ptr + part * 2 + 1, mass, mask=g < G)


@triton.jit
def _join(
    parts_ptr,
    stats_ptr,
    positions_ptr,
    out_ptr,
    window,
    num_chunks,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions_ptr + row).to(tl.int32)
    first = tl.maximum(position + 1 - window, 0)
    d = tl.arange(0, BLOCK_D)
    part = (row * tl.num_programs(1) + head) * num_chunks
    top, mass = -float("inf"), 0.0
    sums = tl.zeros((BLOCK_D,), tl.float32)
    for chunk in range(first // CHUNK, position // CHUNK + 1):
        chunk_top = tl.load(stats_ptr + (part + chunk) * 2)
        new_top = tl.maximum(top, chunk_top)
        kept, taken = tl.exp2(top - new_top), tl.exp2(chunk_top - new_top)
        mass = mass * kept + taken * tl.load(stats_ptr + (part + chunk) * 2 + 1)
        sums = sums * kept + taken * tl.load(parts_ptr + (part + chunk) * D + d, mask=d < D, other=0.0)
        top = new_top
    tl.store(out_ptr + (row * tl.num_programs(1) + head) * D + d, sums / mass, mask=d < D)


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, positions: Tensor, s: DecodeSettings
) -> Tensor:
    """See `fastppo_kernels.decode_attention`."""
    check_device(q)
    if q.dtype not in ROW_DTYPES:
        raise ValueError(f"q must be float32, bfloat16 or float16, got {q.dtype}; convert it")
    n, heads, D = q.shape
    kv_heads = k.shape[1]
    q, k, v, positions = (x.contiguous() for x in (q, k, v, positions))
    chunks = triton.cdiv(s.span, CHUNK)
    out = torch.empty_like(q)
    parts = torch.empty(n, heads, chunks, D, dtype=torch.float32, device=q.device) if chunks > 1 else None
    stats = torch.empty(n, heads, chunks, 2, dtype=torch.float32, device=q.device) if chunks > 1 else None
    groups, block_d = heads // kv_heads, max(LEAST_QUERIES, triton.next_power_of_2(D))
    block = min(64, max(16, (EXACT_TILE if q.dtype == torch.float32 else TILE) // block_d))
    strides = heads * D, kv_heads * D, keys.stride(0), keys.stride(1)
    constants: dict[str, Any] = {
        "G": groups,
        "D": D,
        "BLOCK_G": max(LEAST_QUERIES, triton.next_power_of_2(groups)),
        "BLOCK_D": block_d,
        "BLOCK": block,
        "CHUNK": CHUNK,
        "CAPPED": s.softcap is not None,
        "WHOLE": chunks == 1,
    }
    if not n:
        return out
    with on_device(q):
        memory = q, k, v, keys, values, positions, out, parts, stats
        four_warps = options(4 * warp_size())
        _attend[(n, kv_heads, chunks)](*memory, *strides, s.scale, s.softcap or 0.0, s.reach, **constants, **four_warps)
        if chunks > 1:
            joined: dict[str, Any] = {"D": D, "BLOCK_D": block_d, "CHUNK": CHUNK}
            _join[(n, heads)](parts, stats, positions, out, s.reach, chunks, **joined, **options(warp_size()))
    return out
