"""One new token per sequence through the layers of a decoder in C++: float32 on the CPU."""

import ctypes
from collections.abc import Sequence
from ctypes import byref
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo_kernels.checks import check_shape
from fastppo_kernels.native.isa import chosen_isa
from fastppo_kernels.native.layer_weights import LayerSettings, LayerWeights, check_float32, check_weights
from fastppo_kernels.native.library import load

EVERYTHING = (1 << 62) - 1  # the window of a layer that has none


class Layer(NamedTuple):
    """A layer, and its memory of earlier tokens."""

    weights: LayerWeights
    settings: LayerSettings
    keys: Tensor  # (rows, kv_heads, positions, D)
    values: Tensor


class _Layer(ctypes.Structure):
    """`DecoderLayer` of decoder.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*LayerWeights._fields, "keys", "values")),
        ("window", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("eps", "head_eps", "inner_eps", "scale", "softcap")),
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
    """Layers of one shape that stay where they are in memory.

    Raises:
        ValueError: there is none, a tensor is not contiguous float32 on the CPU, its shape does not fit, or layers
            differ in shape.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        if not layers:
            raise ValueError("a decoder has at least one layer, got none")
        self.layers = [_held(layer) for layer in layers]
        shapes = {tuple(None if x is None else (*x.shape, *x.stride()) for x in _tensors(layer)) for layer in layers}
        keys, values = self.layers[0].keys, self.layers[0].values
        if len(shapes) > 1 or (keys.shape, keys.stride()) != (values.shape, values.stride()):
            raise ValueError("layers, and their keys and values, must have one shape and one layout")
        self.table = (_Layer * len(layers))(*(_pointers(layer) for layer in self.layers))

    def step(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, span: int) -> Tensor:
        """(n, H) of x (n, H), one new token of each of the first n rows of memory, which keeps its keys and values.

        Args:
            cos, sin: (n, D) rotary angles. positions: (n,) int64, each less than `span`.

        Raises:
            ValueError: a shape or a dtype does not fit, or a position lies outside [0, span).
        """
        first, library, n = self.layers[0], _library(), len(x)
        (rows, kv_heads, length, D), q, gate = first.keys.shape, first.weights.q, first.weights.gate
        check_shape((n, q.shape[1]), "(n, H)", x=x)
        check_shape((n, D), "(n, D)", cos=cos, sin=sin)
        check_shape((n,), "(n,)", positions=positions)
        for name, t in {"x": x, "cos": cos, "sin": sin}.items():
            check_float32(name, t)
        if positions.dtype != torch.int64 or not positions.is_cpu:
            raise ValueError(f"positions must be int64 on the CPU, got {positions.dtype} on {positions.device}")
        if n > rows or not 0 < span <= length:
            raise ValueError(f"{n} tokens and span {span} do not fit {rows} rows of {length} positions")
        x = x.clone(memory_format=torch.contiguous_format)  # what comes out is written over it
        cos, sin, positions = cos.contiguous(), sin.contiguous(), positions.contiguous()
        made = _Step(
            *[n, len(self.layers), x.shape[1], q.shape[0] // D, kv_heads, D, gate.shape[0]],
            *[first.keys.stride(0), first.keys.stride(1), span, ctypes.addressof(self.table)],
            *[t.data_ptr() for t in (cos, sin, positions, x)],
            *[None, chosen_isa(), torch.get_num_threads()],
        )
        scratch = x.new_empty(library.fastppo_decoder_scratch(byref(made)))
        made.scratch = scratch.data_ptr()
        if not library.fastppo_decoder_step(byref(made)):
            raise ValueError(f"positions must lie in [0, {span}), got {int(positions.min())} to {int(positions.max())}")
        return x


def _tensors(layer: Layer) -> tuple[Tensor | None, ...]:
    return *layer.weights, layer.keys, layer.values


def _held(layer: Layer) -> Layer:
    """The same memory, whatever becomes of the parameters."""
    w, keys = layer.weights, layer.keys
    check_weights(w, keys.shape[-1])
    for name, x in {**w._asdict(), "keys": keys, "values": layer.values}.items():
        if x is not None:
            check_float32(name, x)
            if not x.is_contiguous() or x.is_neg():
                raise ValueError(f"{name} must be contiguous float32, got strides {x.stride()}")
    if keys.ndim != 4 or keys.shape[1] * keys.shape[3] != len(w.k):
        raise ValueError(f"keys must have shape (rows, {len(w.k)} / D, positions, D), got {tuple(keys.shape)}")
    weights = LayerWeights(*(None if x is None else x.detach() for x in layer.weights))  # pyright: ignore
    return layer._replace(weights=weights)


def _pointers(layer: Layer) -> _Layer:
    s = layer.settings
    window = EVERYTHING if s.window is None else s.window
    pointers = [None if x is None else x.data_ptr() for x in _tensors(layer)]
    return _Layer(*pointers, window, s.eps, s.head_eps, s.inner_eps, s.scale, s.softcap or 0.0)


@cache
def _library() -> ctypes.CDLL:
    library = load()
    library.fastppo_decoder_scratch.argtypes = library.fastppo_decoder_step.argtypes = [ctypes.c_void_p]
    library.fastppo_decoder_scratch.restype = ctypes.c_int64
    library.fastppo_decoder_step.restype = ctypes.c_int
    return library
