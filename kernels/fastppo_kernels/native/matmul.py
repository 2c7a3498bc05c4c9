"""Products of matrices in C++: float32 results on the CPU, whose bits depend on a row, a column and nothing else."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from fastppo_kernels.native.isa import chosen_isa
from fastppo_kernels.native.library import load

_POINTER, _INT, _INT64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def matmul(
    a: Tensor, b: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    """a @ b + bias, made or added to in `out` where that is given.

    Args:
        a: (M, K), b: (K, N), float32 or bfloat16, rows and columns any distance apart. bias: (N,) float32.
        out: (M, N) float32, the columns of a row side by side; it shares no memory with a and b.

    Raises:
        ValueError: shapes, dtypes or strides do not fit together.
    """
    (M, K), N = a.shape, b.shape[1]
    a, b, bias = a.resolve_neg(), b.resolve_neg(), None if bias is None else bias.contiguous()
    if out is None:
        out = a.new_empty(M, N, dtype=torch.float32)
    fits = b.shape[0] == K and out.shape == (M, N) and (N < 2 or out.stride(1) == 1) and out.dtype is torch.float32
    if not fits or not (bias is None or (bias.shape == (N,) and bias.dtype is torch.float32)):
        shapes = [f"{tuple(x.shape)} {x.dtype}" for x in (a, b, out, *(() if bias is None else (bias,)))]
        raise ValueError(f"no product of these: a, b, out and bias are {', '.join(shapes)}")
    _library().fastppo_matmul(
        *[M, N, K, _DTYPES[a.dtype], a.data_ptr(), *a.stride(), _DTYPES[b.dtype], b.data_ptr(), *b.stride()],
        *[None if bias is None else bias.data_ptr(), accumulate, out.data_ptr(), out.stride(0)],
        *[chosen_isa(), torch.get_num_threads()],
    )
    return out


@cache
def _library() -> ctypes.CDLL:
    library, operand = load(), [_INT, _POINTER, _INT64, _INT64]
    library.fastppo_matmul.argtypes = [
        *[_INT64] * 3, *operand, *operand, _POINTER, _INT, _POINTER, _INT64, _INT, _INT
    ]  # fmt: skip
    library.fastppo_matmul.restype = None
    return library
