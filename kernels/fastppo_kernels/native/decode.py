"""Attention of one new token per sequence in C++: CPU tensors only."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from fastppo_kernels.native.isa import chosen_isa
from fastppo_kernels.native.library import load
from fastppo_kernels.settings import DecodeSettings

_POINTER, _INT, _INT64, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, positions: Tensor, s: DecodeSettings
) -> Tensor:
    """See `fastppo_kernels.decode_attention`; float32 inside.

    Raises:
        ValueError: tensors of another dtype than float32 and bfloat16, or a position outside [0, span).
    """
    if q.dtype not in _DTYPES:
        raise ValueError(f"q must be float32 or bfloat16, got {q.dtype}; convert it with .float()")
    (n, heads, D), kv_heads = q.shape, k.shape[1]
    q, k, v, positions = (x.contiguous() for x in (q, k, v, positions))
    out, library, threads = torch.empty_like(q), _library(), torch.get_num_threads()
    size = library.fastppo_decode_scratch(s.span, heads // max(kv_heads, 1), D)
    scratch = q.new_empty(threads, size, dtype=torch.float32)
    legal = library.fastppo_decode_attention(
        *[n, kv_heads, heads // max(kv_heads, 1), D, _DTYPES[q.dtype]],
        *[x.data_ptr() for x in (q, k, v, keys, values)],
        *[keys.stride(0), keys.stride(1), positions.data_ptr(), s.span, s.reach],
        *[s.scale, s.softcap or 0.0, scratch.data_ptr(), out.data_ptr(), chosen_isa(), threads],
    )
    if not legal:
        raise ValueError(f"positions must lie in [0, {s.span}), got {int(positions.min())} to {int(positions.max())}")
    return out


@cache
def _library() -> ctypes.CDLL:
    library = load()
    memory, settings = [_POINTER] * 5, [_INT64, _INT64, _POINTER, _INT64, _INT64, _FLOAT, _FLOAT]
    library.fastppo_decode_attention.argtypes = [
        *[_INT64] * 4, _INT, *memory, *settings, _POINTER, _POINTER, _INT, _INT
    ]  # fmt: skip
    library.fastppo_decode_attention.restype = _INT
    library.fastppo_decode_scratch.argtypes = [_INT64] * 3
    library.fastppo_decode_scratch.restype = _INT64
    return library
