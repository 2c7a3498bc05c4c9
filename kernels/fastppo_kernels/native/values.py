"""The critic's loss in C++: CPU tensors only. Letters: R rows, H hidden; tables have `table.VALUE_COLUMNS`."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from fastppo_kernels.native.isa import chosen_isa
from fastppo_kernels.native.library import load
from fastppo_kernels.table import VALUE_COLUMNS

_POINTER, _INT, _INT64, _DOUBLE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_CHUNK_ROWS = 128  # kChunkRows of values.cpp


def value_rows(values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip: float | None) -> Tensor:
    """(R, 8) float32 table of float32 values (R,), worked on in float64. See `table.value_table`."""
    rows = [x.contiguous() for x in (values, old_values, returns, weights)]
    table = torch.empty(values.shape[0], len(VALUE_COLUMNS), dtype=torch.float32)
    pointers = [x.data_ptr() for x in rows]
    _library().fastppo_value_rows(len(values), *pointers, _bound(clip), table.data_ptr(), torch.get_num_threads())
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
    """The table of the values hidden @ weight + bias and the gradients of the sum of its losses, hidden read once.

    Args:
        hidden: (R, H) float32 or bfloat16, last stride 1 or copied; not read where weights are 0.
        weight: (H,) float.
        bias: one number, () or (1,) float, or None.
        old_values, returns, weights: (R,) float32.
        clip: > 0, or None.
        dhidden: (R, H) of the dtype of hidden, last stride 1, written; it may be hidden itself. None: no gradient.

    Returns:
        (table (R, 8) float32, dweight (H,) float32 or None). The gradient of bias is the sum of column dvalue.

    Raises:
        ValueError: the dtype of hidden is another, or dhidden does not fit it.
    """
    if hidden.dtype not in _DTYPES:
        raise ValueError(f"hidden must be float32 or bfloat16, got {hidden.dtype}; convert it with .float()")
    num_rows, width = hidden.shape
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    weight = weight.to(torch.float32).contiguous()
    rows = [x.contiguous() for x in (old_values, returns, weights)]
    table = torch.empty(num_rows, len(VALUE_COLUMNS), dtype=torch.float32)
    dweight, gradients = None, (None, 0, None, None)
    if dhidden is not None:
        if dhidden.shape != hidden.shape or dhidden.dtype != hidden.dtype or dhidden.stride(1) != 1:
            raise ValueError(f"dhidden must be {tuple(hidden.shape)} {hidden.dtype}, last stride 1; use empty_like")
        partials = torch.empty(-(-num_rows // _CHUNK_ROWS), width, dtype=torch.float64)
        dweight = torch.empty(width, dtype=torch.float32)
        gradients = (dhidden.data_ptr(), dhidden.stride(0), partials.data_ptr(), dweight.data_ptr())
    _library().fastppo_linear_value_rows(
        num_rows,
        width,
        _DTYPES[hidden.dtype],
        hidden.data_ptr(),
        hidden.stride(0),
        weight.data_ptr(),
        0.0 if bias is None else float(bias),
        *[x.data_ptr() for x in rows],
        _bound(clip),
        *gradients,
        table.data_ptr(),
        chosen_isa(),
        torch.get_num_threads(),
    )
    return table, dweight


def _bound(clip: float | None) -> float:
    return -1.0 if clip is None else clip


@cache
def _library() -> ctypes.CDLL:
    library = load()
    rows, gradients = [_POINTER] * 3, [_POINTER, _INT64, _POINTER, _POINTER]
    library.fastppo_value_rows.argtypes = [_INT64, *[_POINTER] * 4, _DOUBLE, _POINTER, _INT]
    library.fastppo_linear_value_rows.argtypes = [
        *[_INT64, _INT64, _INT, _POINTER, _INT64, _POINTER, _DOUBLE],
        *[*rows, _DOUBLE, *gradients, _POINTER, _INT, _INT],
    ]
    for function in (library.fastppo_value_rows, library.fastppo_linear_value_rows):
        function.restype = None
    return library
