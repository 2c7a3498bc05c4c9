"""The C++ backend: the functions of `fastppo_kernels.rows` and of the sequence ops, for CPU tensors."""

from fastppo_kernels.native.library import ABI_VERSION, library_path, load
from fastppo_kernels.native.sequences import gae

__all__ = ["ABI_VERSION", "gae", "library_path", "load"]
