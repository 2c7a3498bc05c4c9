"""One new token per sequence through the layers of a decoder in C++: float32 on the CPU."""

import ctypes
from collections.abc import Sequence
from ctypes import byref
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo_kernels.native.isa import chosen_isa
from fastppo_kernels.native.library import load

EVERYTHING = (1 << 62) - 1  # the window of a layer that has none


class Layer(NamedTuple):
    """Weights (outputs, inputs) of a layer, its memory of earlier tokens, and its settings; float32, contiguous."""

    input_norm: Tensor
    q: Tensor
    q_bias: Tensor | None
    k: Tensor
    k_bias: Tensor | None
    v: Tensor
    v_bias: Tensor | None
    q_norm: Tensor | None  # of a head
    k_norm: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    inner_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    keys: Tensor  # (rows, kv_heads, positions, D)
    values: Tensor
    window: int | None
    eps: float
    head_eps: float
    inner_eps: float
    scale: float
    cap: float | None


class _Layer(ctypes.Structure):
    """`DecoderLayer` of decoder.cpp: the fields of `Layer`, tensors as pointers."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in Layer._fields[:17]),
        ("window", ctypes.c_int64),
        *((name, ctypes.c_float) for name in Layer._fields[18:]),
    )


class _Step(ctypes.Structure):
    """`DecoderStep` of decoder.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_sequences", "num_layers", "hidden", "heads", "kv_heads", "width")),
        *((name, ctypes.c_int64) for name in ("inner", "row_stride", "head_stride", "span")),
        *((name, ctypes.c_void_p) for name in ("layers", "cos", "sin", "positions", "x", "scratch")),
        *((name, ctypes.c_int32) for name in ("isa", "num_threads")),
    )


class DecoderLayers:
    """Layers that stay where they are in memory."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)  # holds the tensors
        self.table = (_Layer * len(layers))(*(_pointers(layer) for layer in layers))

    def step(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, span: int) -> Tensor:
        """(n, H) of x (n, H), one new token of each of the first n rows of memory, which keeps its keys and values.

        Args:
            cos, sin: (n, D) rotary angles. positions: (n,) int64, each less than `span`.

        Raises:
            ValueError: a position outside [0, span).
        """
        first, library = self.layers[0], _library()
        kv_heads, D = first.keys.shape[1], first.keys.shape[3]
        x, cos, sin, positions = x.clone(), cos.contiguous(), sin.contiguous(), positions.contiguous()
        made = _Step(
            *[*x.shape[:1], len(self.layers), x.shape[1], first.q.shape[0] // D, kv_heads, D, first.gate.shape[0]],
            *[first.keys.stride(0), first.keys.stride(1), span, ctypes.addressof(self.table)],
            *[t.data_ptr() for t in (cos, sin, positions, x)],
            *[None, chosen_isa(), torch.get_num_threads()],
        )
        scratch = x.new_empty(library.fastppo_decoder_scratch(byref(made)))
        made.scratch = scratch.data_ptr()
        if not library.fastppo_decoder_step(byref(made)):
            raise ValueError(f"positions must lie in [0, {span}), got {int(positions.min())} to {int(positions.max())}")
        return x


def _pointers(layer: Layer) -> _Layer:
    made = [x.data_ptr() if isinstance(x, Tensor) else None for x in layer[:17]]
    window = EVERYTHING if layer.window is None else layer.window
    return _Layer(*made, window, layer.eps, layer.head_eps, layer.inner_eps, layer.scale, layer.cap or 0.0)


@cache
def _library() -> ctypes.CDLL:
    library = load()
    library.fastppo_decoder_scratch.argtypes = library.fastppo_decoder_step.argtypes = [ctypes.c_void_p]
    library.fastppo_decoder_scratch.restype = ctypes.c_int64
    library.fastppo_decoder_step.restype = ctypes.c_int
    return library
