"""A float32 sum in the memory that its rounding to bfloat16 keeps: CPU only.

The upper 16 bits of a float32 are a bfloat16. Kept in a tensor of their own they become the rounded sum where they are,
so that sum and result never stand side by side.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from fastppo_kernels.native.library import load


class HalvedSum:
    """A float32 matrix, 0 at first, that rows of others are added to: 4 bytes an element, 2 once it is rounded."""

    def __init__(self, num_rows: int, num_columns: int) -> None:
        self.upper = torch.zeros(num_rows, num_columns, dtype=torch.bfloat16, device="cpu")
        self.lower = torch.zeros(num_rows, num_columns, dtype=torch.int16, device="cpu")

    def add(self, rows: slice, addend: Tensor) -> None:
        """Adds `addend`, contiguous float32 of the shape of these rows; rounds as a sum of float32 tensors does."""
        halves = self.upper[rows], self.lower[rows]
        pointers = [x.data_ptr() for x in (addend, *halves)]
        _library().fastppo_add_to_halves(addend.numel(), *pointers, torch.get_num_threads())

    def rounded(self) -> Tensor:
        """The sum in bfloat16, as `Tensor.to` rounds it; the last use, which frees the lower half."""
        pointers = self.upper.data_ptr(), self.lower.data_ptr()
        _library().fastppo_round_halves(self.upper.numel(), *pointers, torch.get_num_threads())
        del self.lower
        return self.upper


@cache
def _library() -> ctypes.CDLL:
    library = load()
    for function, pointers in ((library.fastppo_add_to_halves, 3), (library.fastppo_round_halves, 2)):
        function.argtypes = [ctypes.c_int64, *[ctypes.c_void_p] * pointers, ctypes.c_int]
        function.restype = None
    return library
