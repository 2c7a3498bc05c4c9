"""Sums over the lines of a table in C++: CPU tensors only."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from fastppo_kernels.native.isa import chosen_isa
from fastppo_kernels.native.library import load

_BLOCK_ROWS = 256


def table_sums(table: Tensor) -> Tensor:
    """(3, C) float64: sum, sum of squares and maximum of every column of an (R, C) float32 table, C 8 or 16."""
    num_rows, num_columns = table.shape
    if num_rows == 0:
        return torch.zeros(3, num_columns, dtype=torch.float64)
    table, sums = table.contiguous(), torch.empty(3, num_columns, dtype=torch.float64)
    partials = torch.empty(-(-num_rows // _BLOCK_ROWS), 3, num_columns, dtype=torch.float64)
    pointers = [x.data_ptr() for x in (table, partials, sums)]
    _library().fastppo_table_sums(num_rows, num_columns, _BLOCK_ROWS, *pointers, chosen_isa(), torch.get_num_threads())
    return sums


@cache
def _library() -> ctypes.CDLL:
    library = load()
    library.fastppo_table_sums.argtypes = [*[ctypes.c_int64] * 3, *[ctypes.c_void_p] * 3, *[ctypes.c_int] * 2]
    library.fastppo_table_sums.restype = None
    return library
