"""Products of matrices in C++: float32 results on the CPU.

An element's bits depend on its row and column, on what is added and on the CPU's instructions: not on how many rows or
threads there are.
"""

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
        ValueError: a tensor is not on the CPU, or shapes, dtypes or strides do not fit together.
    """
    if not _fits(a, b, bias, out):
        given = {"a": a, "b": b, "bias": bias, "out": out}
        shapes = [f"{k} {tuple(x.shape)} {x.dtype} on {x.device}" for k, x in given.items() if x is not None]
        raise ValueError(
            "a (M, K) and b (K, N) must be float32 or bfloat16, bias (N,) and out (M, N) float32, out's columns side "
            f"by side and its rows apart, all on the CPU; got {', '.join(shapes)}"
        )
    (M, K), N = a.shape, b.shape[1]
    a, b, bias = a.resolve_neg(), b.resolve_neg(), None if bias is None else bias.resolve_neg().contiguous()
    if out is None:
        out = a.new_empty(M, N, dtype=torch.float32)
    _library().fastppo_matmul(
        *[M, N, K, _DTYPES[a.dtype], a.data_ptr(), *a.stride(), _DTYPES[b.dtype], b.data_ptr(), *b.stride()],
        *[None if bias is None else bias.data_ptr(), accumulate, out.data_ptr(), out.stride(0)],
        *[chosen_isa(), torch.get_num_threads()],
    )
    return out


def _fits(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor | None) -> bool:
    known = all(x.is_cpu and x.dtype in _DTYPES and x.ndim == 2 for x in (a, b))
    if not known or a.shape[1] != b.shape[0]:
        return False
    M, N = a.shape[0], b.shape[1]
    if not all(x is None or (x.is_cpu and x.dtype is torch.float32) for x in (bias, out)):
        return False
    if out is not None and (out.shape != (M, N) or out.is_neg()):
        return False
    apart = out is None or ((N < 2 or out.stride(1) == 1) and (M < 2 or out.stride(0) >= N))
    return apart and (bias is None or bias.shape == (N,))


@cache
def _library() -> ctypes.CDLL:
    library, operand = load(), [_INT, _POINTER, _INT64, _INT64]
    library.fastppo_matmul.argtypes = [
        *[_INT64] * 3, *operand, *operand, _POINTER, _INT, _POINTER, _INT64, _INT, _INT
    ]  # fmt: skip
    library.fastppo_matmul.restype = None
    return library
