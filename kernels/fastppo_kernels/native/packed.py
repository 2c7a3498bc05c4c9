"""Causal attention within packed sequences in C++: float32 tensors on the CPU."""

import ctypes
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fastppo_kernels.native.isa import chosen_isa
from fastppo_kernels.native.library import load
from fastppo_kernels.settings import PackedSettings

_POINTER, _INT, _INT64, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_WIDTH = 16  # of a head, or a multiple; zeros beyond it change no score


def packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, s: PackedSettings) -> tuple[Tensor, Tensor]:
    """See `fastppo_kernels.packed_attention`; and what the gradients need, (2, heads, N).

    Raises:
        ValueError: another dtype than float32, or cu_seqlens that does not rise from 0 to N.
    """
    D = q.shape[2]
    q, k, v = (_aligned(x) for x in (q, k, v))
    out, origins = q.new_empty(q.shape), q.new_empty(2, q.shape[1], q.shape[0])
    _call(q, k, v, cu_seqlens, s, out, origins)
    return _narrowed(out, D), origins


def packed_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, s: PackedSettings, out: Tensor, origins: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, of which `packed_attention` made `out` and `origins`."""
    D = q.shape[2]
    q, k, v = (_aligned(x) for x in (q, k, v))
    out, dout = (_aligned(x).contiguous() for x in (out, dout))
    gradients = q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    _call(q, k, v, cu_seqlens, s, out, origins, dout, *gradients)
    dq, dk, dv = (_narrowed(x, D) for x in gradients)
    return dq, dk, dv


def _aligned(x: Tensor) -> Tensor:
    """Heads of a legal width, whose elements lie one after the other."""
    if x.dtype != torch.float32:
        raise ValueError(
            f"q, k and v must be float32, got {x.dtype}; convert with .float() or pass backend='reference'"
        )
    x = F.pad(x, (0, -x.shape[2] % _WIDTH)) if x.shape[2] % _WIDTH else x
    return x if x.stride(2) == 1 else x.contiguous()


def _narrowed(x: Tensor, D: int) -> Tensor:
    return x if x.shape[2] == D else x[..., :D].contiguous()


def _call(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, s: PackedSettings, out: Tensor, origins: Tensor,
    *gradients: Tensor,
) -> None:  # fmt: skip
    library, threads, cu_seqlens = _library(), torch.get_num_threads(), cu_seqlens.contiguous()
    limits = len(cu_seqlens) - 1, cu_seqlens.data_ptr()
    longest = library.fastppo_packed_longest(*limits, len(q))
    if longest < 0:
        raise ValueError(f"cu_seqlens must rise from 0 to N = {len(q)}, got {cu_seqlens.tolist()[:8]} ...")
    scratch = q.new_empty(threads, library.fastppo_packed_scratch(longest, q.shape[2]))
    inputs = [y for x in (q, k, v) for y in (x.data_ptr(), x.stride(0), x.stride(1))]
    library.fastppo_packed_attention(
        *[*limits, q.shape[1], k.shape[1], q.shape[2], len(q) if s.window is None else s.window, s.scale, *inputs],
        *[out.data_ptr(), origins.data_ptr(), *([x.data_ptr() for x in gradients] or [None] * 4)],
        *[longest, scratch.data_ptr(), chosen_isa(), threads],
    )


@cache
def _library() -> ctypes.CDLL:
    library = load()
    library.fastppo_packed_attention.argtypes = [
        *[_INT64, _POINTER, *[_INT64] * 4, _FLOAT, *[_POINTER, _INT64, _INT64] * 3, *[_POINTER] * 6],
        *[_INT64, _POINTER, _INT, _INT],
    ]
    library.fastppo_packed_attention.restype = None
    library.fastppo_packed_longest.argtypes = [_INT64, _POINTER, _INT64]
    library.fastppo_packed_scratch.argtypes = [_INT64] * 2
    library.fastppo_packed_longest.restype = library.fastppo_packed_scratch.restype = _INT64
    return library
