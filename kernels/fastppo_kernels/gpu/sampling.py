"""Sampling in Triton: one uniform number per row, the inverse of the row's CDF, and the log-prob of what was drawn.

    token = first column whose cumulative mass exceeds u * total,   mass_i = exp((z_i - max) / temperature)

One program per row. It sweeps the row once for a maximum and a mass per block of columns, chooses the block, and reads
that block again to choose the column: 2 bytes per bfloat16 logit through device memory and nothing written back.

top_k and top_p keep the columns above a threshold, and of those that equal it the first few. The threshold is searched
by bisection of the float32 numbers in their order: every sweep weighs (top_k: counts) the columns above a pivot and
notes the nearest logits on either side of it, so the search ends when no logit is left between the bounds: after 32
sweeps at most, 10 to 21 of rows of 128256 normal numbers, 5 to 8 for top_p after top_k = 50. The row stays in the L2
cache meanwhile. No sort, no atomics: every sum has a fixed order.

Ties at the threshold: the lowest columns are kept, for top_k as for top_p, where the stable sort of the reference does
the same. torch.topk leaves open which of equal logits it takes, so there the two may differ.
"""

# pyright: reportGeneralTypeIssues=false
# (a Triton device function that returns several values looks to it like one that never returns)

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo_kernels.gpu.launch import ROW_DTYPES, check_device, on_device

BLOCK = 8192  # columns of a sweep's step
LOG2_E = math.log2(math.e)

# What a column weighs: exp2(scale (x - maximum)) if it is kept, else 0; VIEW_TIES: 1 if it equals the threshold.
VIEW_ALL = tl.constexpr(0)  # every column
VIEW_KEPT = tl.constexpr(1)  # all but those below the threshold, and those equal to it beyond column `last_tie`
VIEW_TIES = tl.constexpr(2)


@triton.jit
def _columns(row_ptr, block, V, threshold, last_tie, VIEW: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """Logits of a block as a view shows them, (BLOCK,) float32; -inf where a column weighs nothing."""
    cols = block * BLOCK + tl.arange(0, BLOCK)
    if TAIL:
        x = tl.load(row_ptr + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
    else:
        x = tl.load(row_ptr + cols).to(tl.float32)
    if VIEW == VIEW_KEPT:
        x = tl.where((x < threshold) | ((x == threshold) & (cols > last_tie)), -float("inf"), x)  # NaN is no less
    if VIEW == VIEW_TIES:
        x = tl.where((x == threshold) & (cols < V), 0.0, -float("inf"))
    return x


@triton.jit
def _block_mass(x, scale):
    """(maximum, sum of exp2(scale (x - maximum))) of a block; (-inf, 0) if it has no finite logit."""
    top = tl.max(x, axis=0)
    base = tl.where(top == -float("inf"), 0.0, top)
    return top, tl.sum(tl.exp2((x - base) * scale), axis=0)


@triton.jit
def _masses(row_ptr, V, scale, threshold, last_tie, VIEW: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """(maximum, mass of each block relative to it (NUM_BLOCKS,), their sum); (-inf, 0, 0) of nothing: one sweep."""
    blocks = tl.arange(0, NUM_BLOCKS)
    tops = tl.full((NUM_BLOCKS,), -float("inf"), tl.float32)
    masses = tl.zeros((NUM_BLOCKS,), tl.float32)
    whole = V // BLOCK
    for block in tl.range(0, whole, num_stages=3):
        x = _columns(row_ptr, block, V, threshold, last_tie, VIEW, BLOCK, TAIL=False)
        top, mass = _block_mass(x, scale)
        tops = tl.where(blocks == block, top, tops)
        masses = tl.where(blocks == block, mass, masses)
    if whole * BLOCK < V:
        x = _columns(row_ptr, whole, V, threshold, last_tie, VIEW, BLOCK, TAIL=True)
        top, mass = _block_mass(x, scale)
        tops = tl.where(blocks == whole, top, tops)
        masses = tl.where(blocks == whole, mass, masses)
    top = tl.max(tops, axis=0)
    masses *= tl.exp2((tops - tl.where(top == -float("inf"), 0.0, top)) * scale)
    return top, masses, tl.sum(masses, axis=0)


@triton.jit
def _first_above(masses, goal, SIZE: tl.constexpr):
    """(index, mass before it): first whose cumulative mass exceeds the goal, else (rounding) the last with any mass.

    A mass of 0 is never chosen: partial sums in parallel need not rise, so they alone do not rule it out.
    """
    index = tl.arange(0, SIZE)
    above = (tl.cumsum(masses, axis=0) > goal) & (masses > 0)
    first = tl.min(tl.where(above, index, SIZE), axis=0)
    chosen = tl.minimum(first, tl.max(tl.where(masses > 0, index, 0), axis=0))
    return chosen, tl.sum(tl.where(index < chosen, masses, 0.0), axis=0)


@triton.jit
def _column_above(
    row_ptr,
    V,
    scale,
    threshold,
    last_tie,
    top,
    masses,
    goal,
    VIEW: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """First column whose cumulative mass exceeds the goal, given the masses of the blocks; reads one block."""
    block, before = _first_above(masses, goal, NUM_BLOCKS)
    x = _columns(row_ptr, block, V, threshold, last_tie, VIEW, BLOCK, TAIL=True)
    column, _ = _first_above(tl.exp2((x - top) * scale), goal - before, BLOCK)
    return block * BLOCK + column


@triton.jit
def _order(x):
    """int64 that rises with the float32 scalar x."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _ordered(order):
    """The float32 scalar of an `_order`."""
    bits = order.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _weigh(x, weights, least, most, pivot, top, scale, COUNT: tl.constexpr):
    """Adds a block to the columns x >= pivot, and takes it into the nearest logits on either side of the pivot."""
    at_least = x >= pivot
    weight = 1.0 if COUNT else tl.exp2((x - top) * scale)
    weights += tl.where(at_least, weight, 0.0)
    least = tl.minimum(least, tl.where(at_least, x, float("inf")))
    most = tl.maximum(most, tl.where(at_least, -float("inf"), x))
    return weights, least, most


@triton.jit
def _sweep(row_ptr, V, pivot, top, scale, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """(weight of the columns x >= pivot, the least logit of them, the greatest of the others)."""
    weights = tl.zeros((BLOCK,), tl.float32)
    least = tl.full((BLOCK,), float("inf"), tl.float32)
    most = tl.full((BLOCK,), -float("inf"), tl.float32)
    whole = V // BLOCK
    for block in range(0, whole):
        x = _columns(row_ptr, block, V, pivot, 0, VIEW_ALL, BLOCK, TAIL=False)
        weights, least, most = _weigh(x, weights, least, most, pivot, top, scale, COUNT)
    if whole * BLOCK < V:
        x = _columns(row_ptr, whole, V, pivot, 0, VIEW_ALL, BLOCK, TAIL=True)
        weights, least, most = _weigh(x, weights, least, most, pivot, top, scale, COUNT)
    return tl.sum(weights, axis=0), tl.min(least, axis=0), tl.max(most, axis=0)


@triton.jit
def _threshold(row_ptr, V, scale, lowest, top, goal, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """(t, weight of the columns x > t): t is the largest logit such that the columns x >= t weigh `goal` or more.

    Invariant: the columns >= low weigh enough, those > high do not; high is a logit of the row, low may be any number.
    """
    low, high = _order(lowest), _order(top)
    above = goal * 0.0
    while low < high:
        middle = high - (high - low) // 2  # in (low, high]
        weight, least, most = _sweep(row_ptr, V, _ordered(middle), top, scale, COUNT, BLOCK)
        if weight >= goal:
            low = tl.maximum(_order(least), middle)  # maximum, minimum: -0.0 < 0.0 in this order alone
        else:
            above = weight
            high = tl.minimum(_order(most), middle - 1)
    return _ordered(high), above


@triton.jit
def _cut(row_ptr, V, scale, top, total, top_k, top_p, NUM_BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """(threshold, last_tie) of the columns that top_k and then top_p keep; either may be None."""
    threshold, ties = tl.full((), -float("inf"), tl.float32), tl.full((), float("inf"), tl.float32)
    if top_k is not None:
        threshold, above = _threshold(row_ptr, V, scale, threshold, top, top_k, True, BLOCK)
        ties = top_k - above
        _, _, total = _masses(row_ptr, V, scale, threshold, -1, VIEW_KEPT, NUM_BLOCKS, BLOCK)  # those above it
        total += ties * tl.exp2((threshold - top) * scale)
    if top_p is not None:
        lowest, goal = threshold, total * top_p
        threshold, above = _threshold(row_ptr, V, scale, lowest, top, goal, False, BLOCK)
        wanted = tl.maximum(tl.ceil((goal - above) / tl.exp2((threshold - top) * scale)), 1.0)
        ties = tl.where(threshold == lowest, tl.minimum(wanted, ties), wanted)
    tie_top, counts, _ = _masses(row_ptr, V, scale, threshold, 0, VIEW_TIES, NUM_BLOCKS, BLOCK)
    last_tie = _column_above(row_ptr, V, scale, threshold, 0, tie_top, counts, ties - 0.5, VIEW_TIES, NUM_BLOCKS, BLOCK)
    return threshold, last_tie


@triton.jit
def _sample_kernel(
    logits_ptr,  # (R, V), rows row_stride apart
    uniform_ptr,  # (R,)
    tokens_ptr,  # (R,) int64
    logprobs_ptr,  # (R,) float32
    log_mass_ptr,  # (R,) float32
    V,
    row_stride,
    scale,  # log2(e) / temperature
    inverse_temperature,
    top_k,  # float; None: every column
    top_p,  # float; None: every column
    VIEW: tl.constexpr,  # VIEW_KEPT if one of the two is given, else VIEW_ALL
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    threshold, last_tie = -float("inf"), V
    top, masses, total = _masses(row_ptr, V, scale, threshold, last_tie, VIEW_ALL, NUM_BLOCKS, BLOCK)
    log_total = tl.log(total)
    if VIEW == VIEW_KEPT:
        threshold, last_tie = _cut(row_ptr, V, scale, top, total, top_k, top_p, NUM_BLOCKS, BLOCK)
        top, masses, total = _masses(row_ptr, V, scale, threshold, last_tie, VIEW_KEPT, NUM_BLOCKS, BLOCK)
    goal = tl.load(uniform_ptr + row).to(tl.float32) * total
    token = _column_above(row_ptr, V, scale, threshold, last_tie, top, masses, goal, VIEW, NUM_BLOCKS, BLOCK)
    log_kept = tl.log(total)
    x = tl.load(row_ptr + token).to(tl.float32)
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(logprobs_ptr + row, (x - top) * inverse_temperature - log_kept)
    tl.store(log_mass_ptr + row, log_kept - log_total)  # the same sum if nothing is cut


def sample(
    logits: Tensor, uniform: Tensor, *, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One token per row of softmax(logits / temperature), truncated by top_k, then top_p. See `fastppo_kernels.sample`.

    Args:
        logits: (R, V) float32, bfloat16 or float16; any row stride.
        uniform: (R,) float32 or float64 in [0, 1). Rounded to float32, as is the CDF: a draw can differ from that of
            the number given only where this lies within 6e-8 of a step of the CDF, and 1 draws the last column.
        temperature: > 0.
        top_k: keep the k most probable columns; 0 or V: all.
        top_p: then keep the fewest most probable columns whose mass reaches top_p; 1: all.

    Returns:
        tokens: (R,) int64. Of a row that holds NaN, or nothing but -inf: any column, with log-prob NaN.
        logprobs: (R,) float32 under the distribution drawn from, truncated and renormalised.
        log_mass: (R,) float32, log of the mass kept; 0 where nothing is cut. logprobs + log_mass is the log-prob
            before truncation.

    Raises:
        ValueError: CPU tensors, and kernels are not interpreted; or other dtypes.
    """
    check_device(logits)
    if logits.dtype not in ROW_DTYPES or uniform.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            "logits must be float32, bfloat16 or float16 and uniform float32 or float64, "
            f"got {logits.dtype} and {uniform.dtype}; convert them with .float()"
        )
    logits, uniform = logits.detach(), uniform.detach().contiguous()
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    num_rows, vocab = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    logprobs, log_mass = (torch.empty(num_rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    block = min(BLOCK, triton.next_power_of_2(vocab))
    num_blocks = triton.next_power_of_2(triton.cdiv(vocab, block))
    cut = (float(top_k) if 0 < top_k < vocab else None, top_p if top_p < 1.0 else None)
    scales, outputs = (LOG2_E / temperature, 1.0 / temperature), (tokens, logprobs, log_mass)
    view = VIEW_ALL if cut == (None, None) else VIEW_KEPT
    constants = {"VIEW": view, "NUM_BLOCKS": num_blocks, "BLOCK": block, "num_warps": min(16, max(1, block // 512))}
    with on_device(logits):
        if num_rows:
            grid = (num_rows,)
            _sample_kernel[grid](logits, uniform, *outputs, vocab, logits.stride(0), *scales, *cut, **constants)
    return tokens, logprobs, log_mass
