"""Sampling by inverse CDF in C++: CPU tensors only."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from fastppo_kernels.native.isa import chosen_isa
from fastppo_kernels.native.library import load

_POINTER, _INT, _INT64, _DOUBLE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def sample(
    logits: Tensor, uniform: Tensor, *, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One token per row of softmax(logits / temperature), truncated to top_k (0: all) and then to top_p (1: all).

    The token is the first column at which the CDF, in the order of the vocabulary, exceeds uniform times its total, as
    in `reference.sample`. Columns of equal logits are cut from the highest column down. A column less probable than
    2^-126 times the most probable one is never drawn.

    Args:
        logits: (R, V) float32 or bfloat16, last stride 1 or copied.
        uniform: (R,) of any float dtype, in [0, 1); none is rounded.
        temperature: > 0.
        top_k: >= 0.
        top_p: in (0, 1].

    Returns:
        tokens: (R,) int64.
        logprobs: (R,) float32 under the distribution drawn from.
        log_mass: (R,) float32, log of the mass that was kept before renormalising: logprobs + log_mass is the log-prob
            without truncation. A row that is no distribution (a NaN, +inf, nothing but -inf) has token 0 and NaNs.

    Raises:
        ValueError: the logits are of another dtype, or the uniforms of no float dtype.
    """
    if logits.dtype not in _DTYPES or not uniform.is_floating_point():
        raise ValueError(
            "logits must be float32 or bfloat16 and uniform a float tensor, "
            f"got {logits.dtype} and {uniform.dtype}; convert them with .float()"
        )
    num_rows, num_columns = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    uniform = uniform.to(torch.float64).contiguous()
    tokens = torch.empty(num_rows, dtype=torch.int64)
    logprobs, log_mass = torch.empty(num_rows, dtype=torch.float32), torch.empty(num_rows, dtype=torch.float32)
    library, num_threads = _library(), torch.get_num_threads()
    per_thread = library.fastppo_sample_scratch(num_columns, top_k, top_p)
    scratch = torch.empty(num_threads, per_thread, dtype=torch.float64)
    library.fastppo_sample(
        num_rows,
        num_columns,
        _DTYPES[logits.dtype],
        logits.data_ptr(),
        logits.stride(0),
        uniform.data_ptr(),
        temperature,
        top_k,
        top_p,
        *[x.data_ptr() for x in (tokens, logprobs, log_mass, scratch)],
        chosen_isa(),
        num_threads,
    )
    return tokens, logprobs, log_mass


@cache
def _library() -> ctypes.CDLL:
    library = load()
    truncation, out = [_DOUBLE, _INT64, _DOUBLE], [_POINTER] * 4
    library.fastppo_sample.argtypes = [
        *[_INT64, _INT64, _INT, _POINTER, _INT64, _POINTER],
        *[*truncation, *out, _INT, _INT],
    ]
    library.fastppo_sample.restype = None
    library.fastppo_sample_scratch.argtypes = [_INT64, _INT64, _DOUBLE]
    library.fastppo_sample_scratch.restype = _INT64
    return library
