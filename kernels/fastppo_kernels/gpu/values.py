"""The critic's loss in Triton: one line of VALUE_COLUMNS per row, from values or from hidden states and a value head.

    v       = hidden . weight + bias                                   one number per row, float32
    loss    = w/2 max((v - R)^2, (clip(v, old - c, old + c) - R)^2)
    dhidden = dvalue weight      dweight = sum of dvalue hidden        in the pass that reads the hidden states

A row of hidden states is read once and stays in registers until its gradient is written: 4 R H bytes in bfloat16. A
program owns a fixed number of rows and leaves one line of dweight; a second kernel adds the lines in a fixed order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo_kernels.gpu.launch import check_device, on_device
from fastppo_kernels.table import VALUE_COLUMNS

BLOCK_ROWS = 256  # rows of a program that reads values
PROGRAM_ROWS = 32  # rows of a program that reads hidden states: its line of dweight adds 1/8 to the bytes of dhidden


@triton.jit
def _value_lines(table_ptr, rows, inside, v, old, target, w, clip):
    """Stores the 8 columns of every row; returns (dvalue, live). A row of weight 0 is 0 whatever its inputs hold."""
    live = w != 0
    error = v - target
    worst = error * error
    slope = error
    clipped = worst < worst
    if clip is not None:
        moved = v - old
        free = tl.abs(moved) <= clip
        bounded = tl.where(free, v, old + tl.where(moved > 0, clip, -clip))  # free: not old + moved, which rounds
        other = (bounded - target) * (bounded - target)
        clipped = other > worst
        worst = tl.where(clipped, other, worst)
        slope = tl.where(clipped, 0.0, error)  # a value that is free is never clipped
    dvalue = tl.where(live, w * slope, 0.0)
    line = table_ptr + rows * 8
    tl.store(line, tl.where(live, 0.5 * w * worst, 0.0), mask=inside)
    tl.store(line + 1, tl.where(live, v, 0.0), mask=inside)
    tl.store(line + 2, tl.where(live, error * error, 0.0), mask=inside)
    tl.store(line + 3, (live & clipped).to(tl.float32), mask=inside)
    tl.store(line + 4, tl.where(live, target, 0.0), mask=inside)
    tl.store(line + 5, dvalue, mask=inside)
    tl.store(line + 6, live.to(tl.float32), mask=inside)
    tl.store(line + 7, tl.zeros_like(dvalue), mask=inside)
    return dvalue, live


@triton.jit
def _value_kernel(
    values_ptr,  # (R,)
    old_values_ptr,  # (R,)
    returns_ptr,  # (R,)
    weights_ptr,  # (R,)
    table_ptr,  # (R, 8) float32
    R,
    clip,  # None: no clip
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < R
    v = tl.load(values_ptr + rows, mask=inside, other=0.0).to(tl.float32)
    old = tl.load(old_values_ptr + rows, mask=inside, other=0.0).to(tl.float32)
    target = tl.load(returns_ptr + rows, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weights_ptr + rows, mask=inside, other=0.0).to(tl.float32)
    _value_lines(table_ptr, rows, inside, v, old, target, w, clip)


@triton.jit
def _linear_value_kernel(
    hidden_ptr,  # (R, H), rows hidden_stride apart
    weight_ptr,  # (H,)
    bias_ptr,  # (1,) or None
    old_values_ptr,  # (R,)
    returns_ptr,  # (R,)
    weights_ptr,  # (R,)
    table_ptr,  # (R, 8) float32
    dhidden_ptr,  # (R, H), rows dhidden_stride apart, or None: no gradient
    partial_ptr,  # (programs, H) float32, or None: no gradient
    R,
    H,
    hidden_stride,
    dhidden_stride,
    clip,  # None: no clip
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_H)
    is_col = cols < H
    weight = tl.load(weight_ptr + cols, mask=is_col, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_H,), tl.float32)
    for first in range(0, ROWS, TILE):
        rows = program * ROWS + first + tl.arange(0, TILE)
        inside = rows < R
        w = tl.load(weights_ptr + rows, mask=inside, other=0.0).to(tl.float32)
        live = w != 0
        old = tl.load(old_values_ptr + rows, mask=live, other=0.0).to(tl.float32)
        target = tl.load(returns_ptr + rows, mask=live, other=0.0).to(tl.float32)
        at = rows[:, None] * hidden_stride + cols[None, :]
        hidden = tl.load(hidden_ptr + at, mask=live[:, None] & is_col[None, :], other=0.0).to(tl.float32)
        v = tl.sum(hidden * weight[None, :], axis=1)
        if bias_ptr is not None:
            v += tl.load(bias_ptr).to(tl.float32)
        dvalue, live = _value_lines(table_ptr, rows, inside, v, old, target, w, clip)
        if dhidden_ptr is not None:
            dhidden = tl.where(live[:, None], dvalue[:, None] * weight[None, :], 0.0)  # 0 * inf is not 0
            at = rows[:, None] * dhidden_stride + cols[None, :]
            tl.store(dhidden_ptr + at, dhidden.to(dhidden_ptr.dtype.element_ty), mask=inside[:, None] & is_col[None, :])
            dweight += tl.sum(dvalue[:, None] * hidden, axis=0)
    if partial_ptr is not None:
        tl.store(partial_ptr + program * H + cols, dweight, mask=is_col)


@triton.jit
def _sum_lines_kernel(
    partial_ptr,  # (P, H) float32
    dweight_ptr,  # (H,) float32
    P,
    H,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_P, BLOCK_H), tl.float32)
    for first in range(0, P, BLOCK_P):
        lines = (first + tl.arange(0, BLOCK_P)).to(tl.int64)
        inside = (lines < P)[:, None] & (cols < H)[None, :]
        total += tl.load(partial_ptr + lines[:, None] * H + cols[None, :], mask=inside, other=0.0)
    tl.store(dweight_ptr + cols, tl.sum(total, axis=0), mask=cols < H)


class Tile(NamedTuple):
    """How a program holds hidden states in registers."""

    rows: int
    columns: int
    num_warps: int


def linear_tile(hidden_size: int) -> Tile:
    """From H alone, so that the order of every sum is the same on every device.

    A thread holds 32 numbers of hidden and up to 32 of weight and dweight, in 128 registers or fewer up to H = 16384;
    above that the registers do not suffice and some are spilled.
    """
    columns = max(128, triton.next_power_of_2(hidden_size))
    num_warps = min(16, max(4, columns // 512))
    return Tile(min(4, max(1, 1024 * num_warps // columns)), columns, num_warps)


def value_rows(values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip: float | None) -> Tensor:
    """(R, 8) float32, columns as VALUE_COLUMNS. All arguments (R,) float; a row of weight 0 is not looked at.

    Raises:
        ValueError: CPU tensors, and kernels are not interpreted.
    """
    check_device(values)
    num_rows = values.shape[0]
    v, old, target, w = (x.detach().contiguous() for x in (values, old_values, returns, weights))
    table = torch.empty(num_rows, len(VALUE_COLUMNS), dtype=torch.float32, device=values.device)
    with on_device(values):
        if num_rows:
            grid = (triton.cdiv(num_rows, BLOCK_ROWS),)
            _value_kernel[grid](v, old, target, w, table, num_rows, clip, BLOCK=BLOCK_ROWS)
    return table


def linear_value_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    old_values: Tensor,
    returns: Tensor,
    weights: Tensor,
    clip: float | None,
    *,
    dhidden: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """`value_rows` of hidden @ weight + bias, and the gradients of its loss in the same pass.

    Args:
        hidden: (R, H) float; a row of weight 0 is not read.
        weight: (H,) float.
        bias: one number, or None.
        old_values, returns, weights: (R,) float.
        clip: how far a value may move from its old one; None: any distance.
        dhidden: (R, H) float with last stride 1, overwritten with the gradient of hidden; None: no gradient.

    Returns:
        (table (R, 8) float32, dweight (H,) float32 or None). The gradient of bias is the sum of column dvalue.

    Raises:
        ValueError: CPU tensors, and kernels are not interpreted.
    """
    check_device(hidden)
    hidden, weight = hidden.detach(), weight.detach().contiguous()
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    assert dhidden is None or dhidden.stride(1) == 1, "the rows of dhidden must be contiguous"
    num_rows, hidden_size = hidden.shape
    tile, programs = linear_tile(hidden_size), triton.cdiv(num_rows, PROGRAM_ROWS)
    old, target, w = (x.detach().contiguous() for x in (old_values, returns, weights))
    table = torch.empty(num_rows, len(VALUE_COLUMNS), dtype=torch.float32, device=hidden.device)
    partial = None if dhidden is None else table.new_empty(programs, hidden_size)
    strides = (hidden.stride(0), 0 if dhidden is None else dhidden.stride(0))
    constants = {"ROWS": PROGRAM_ROWS, "TILE": tile.rows, "BLOCK_H": tile.columns, "num_warps": tile.num_warps}
    with on_device(hidden):
        if programs:
            _linear_value_kernel[(programs,)](
                hidden, weight, bias, old, target, w, table, dhidden, partial, num_rows, hidden_size, *strides, clip,
                **constants,
            )  # fmt: skip
        return table, None if partial is None else _sum_lines(partial)


def _sum_lines(partial: Tensor) -> Tensor:
    """(H,) sum of the P lines of (P, H), in an order that depends on P alone."""
    lines, hidden_size = partial.shape
    total = partial.new_empty(hidden_size)
    _sum_lines_kernel[(triton.cdiv(hidden_size, 32),)](partial, total, lines, hidden_size, BLOCK_P=32, BLOCK_H=32)
    return total
