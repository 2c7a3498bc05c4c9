"""A gradient times grad_output, where it lies: made along with the loss, it is right as it is when that number is 1."""

import triton
import triton.language as tl
from torch import Tensor

from fastppo_kernels.gpu.launch import check_device, num_processors, on_device, options

BLOCK = 4096
THREADS = 256
PROGRAMS_PER_PROCESSOR = 8


@triton.jit
def scale_kernel(
    x_ptr,  # (R, V), rows row_stride elements apart
    factor_ptr,  # () float32 or float64, whose arithmetic it is
    num_rows,
    num_columns,
    row_stride,
    BLOCK: tl.constexpr,
):
    factor = tl.load(factor_ptr)
    if factor == 1.0:  # asked here, where no host waits for the answer
        return
    tiles = tl.cdiv(num_columns, BLOCK)
    for tile in range(tl.program_id(0), num_rows * tiles, tl.num_programs(0)):
        column = (tile % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        at = x_ptr + (tile // tiles).to(tl.int64) * row_stride + column
        x = tl.load(at, mask=column < num_columns, other=1.0)
        tl.store(at, (x.to(factor.dtype) * factor).to(x.dtype), mask=column < num_columns)


def scale_(x: Tensor, factor: Tensor) -> None:
    """x *= factor with one rounding; where factor is 1 not a byte of x is read or written. No host sync.

    Args:
        x: float, (), (V,) or (R, V); fastest with the last stride 1.
        factor: () float32, or float64 for float64 x, on the device of x.

    Raises:
        ValueError: CPU tensors without the interpreter.
    """
    check_device(x)
    if x.numel() == 0:
        return
    matrix = x if x.ndim == 2 else x.view(1, -1)
    if matrix.stride(1) != 1 and matrix.shape[1] != 1:
        x.copy_(x.to(factor.dtype) * factor)
        return
    num_rows, num_columns = matrix.shape
    programs = min(num_rows * triton.cdiv(num_columns, BLOCK), PROGRAMS_PER_PROCESSOR * max(num_processors(x), 1))
    with on_device(x):
        scale_kernel[(programs,)](
            matrix, factor, num_rows, num_columns, matrix.stride(0), BLOCK=BLOCK, **options(THREADS)
        )
