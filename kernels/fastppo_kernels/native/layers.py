"""Norms, gated activations and rotary positions in C++: float32 on the CPU, contiguous unless said otherwise."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from fastppo_kernels.native.isa import chosen_isa
from fastppo_kernels.native.library import load

_POINTER, _INT, _INT64, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `fastppo_kernels.layers.rms_norm`; and what each row of (R, H) was multiplied by, (R,)."""
    out, rates = torch.empty_like(x), x.new_empty(x.shape[0])
    _library().fastppo_rms_norm(*x.shape, *_at(x, weight), eps, *_at(out, rates), chosen_isa(), torch.get_num_threads())
    return out, rates


def rms_norm_backward(dout: Tensor, x: Tensor, weight: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    library, dx = _library(), torch.empty_like(x)
    dweights = x.new_empty(library.fastppo_norm_parts(x.shape[0]), x.shape[1])
    tensors = _at(dout, x, weight, rates, dx, dweights)
    library.fastppo_rms_norm_backward(*x.shape, *tensors, chosen_isa(), torch.get_num_threads())
    return dx, dweights.sum(0)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of any shape."""
    out = torch.empty_like(gate)
    _library().fastppo_gated(gate.numel(), *_at(gate, up, out), chosen_isa(), torch.get_num_threads())
    return out


def gated_backward(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    tensors = _at(dout, gate, up, dgate, dup)
    _library().fastppo_gated_backward(gate.numel(), *tensors, chosen_isa(), torch.get_num_threads())
    return dgate, dup


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    """(N, heads, D) rotated by cos and sin (N, D), or back; rows and heads of x any distance apart."""
    out = x.new_empty(x.shape)
    places = x.data_ptr(), x.stride(0), x.stride(1), *_at(cos, sin)
    _library().fastppo_rotate(*x.shape, *places, back, *_at(out), chosen_isa(), torch.get_num_threads())
    return out


def _at(*tensors: Tensor) -> list[int]:
    return [x.data_ptr() for x in tensors]


@cache
def _library() -> ctypes.CDLL:
    library = load()
    run = [_INT, _INT]  # instruction set, threads
    library.fastppo_rms_norm.argtypes = [_INT64, _INT64, *[_POINTER] * 2, _FLOAT, *[_POINTER] * 2, *run]
    library.fastppo_norm_parts.argtypes, library.fastppo_norm_parts.restype = [_INT64], _INT64
    library.fastppo_rms_norm_backward.argtypes = [_INT64, _INT64, *[_POINTER] * 6, *run]
    library.fastppo_gated.argtypes = [_INT64, *[_POINTER] * 3, *run]
    library.fastppo_gated_backward.argtypes = [_INT64, *[_POINTER] * 5, *run]
    library.fastppo_rotate.argtypes = [*[_INT64] * 3, _POINTER, _INT64, _INT64, *[_POINTER] * 2, _INT, _POINTER, *run]
    for name in ("rms_norm", "rms_norm_backward", "gated", "gated_backward", "rotate"):
        getattr(library, f"fastppo_{name}").restype = None
    return library
