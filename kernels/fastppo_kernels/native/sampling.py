"""Sampling by inverse CDF in C++: CPU tensors only."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from fastppo_kernels.native.library import load

_POINTER, _INT, _INT64, _DOUBLE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_ELEMENTS_PER_THREAD = 1 << 20  # about 0.2 ms of work: waking and joining threads must not matter


def sample(
    logits: Tensor, uniform: Tensor, *, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One token per row of softmax(logits / temperature), truncated to top_k (0: all) and then to top_p (1: all).

    The token is the first column at which the CDF, in the order of the vocabulary, exceeds uniform times its total, as
    in `reference.sample`. Columns of equal logits are cut from the highest column down. A column less probable than
    2^-126 times the most probable one is never drawn.

    Args:
        logits: (R, V) float32 or bfloat16, last stride 1 or copied.
        uniform: (R,) float32 or float64, in [0, 1).
        temperature: > 0.
        top_k: >= 0.
        top_p: in (0, 1].

    Returns:
        tokens: (R,) int64.
        logprobs: (R,) float32 under the distribution drawn from.
        log_mass: (R,) float32, log of the mass that was kept before renormalising: logprobs + log_mass is the log-prob
            without truncation. A row that is no distribution (a NaN, +inf, nothing but -inf) has token 0 and NaNs.

    Raises:
        ValueError: the dtypes are others.
    """
    if logits.dtype not in _DTYPES or uniform.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            "logits must be float32 or bfloat16 and uniform float32 or float64, "
            f"got {logits.dtype} and {uniform.dtype}; convert them with .float()"
        )
    num_rows, num_columns = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    uniform = uniform.contiguous()
    tokens = torch.empty(num_rows, dtype=torch.int64)
    logprobs, log_mass = torch.empty(num_rows, dtype=torch.float32), torch.empty(num_rows, dtype=torch.float32)
    _function()(
        num_rows,
        num_columns,
        _DTYPES[logits.dtype],
        logits.data_ptr(),
        logits.stride(0),
        uniform.dtype == torch.float64,
        uniform.data_ptr(),
        temperature,
        top_k,
        top_p,
        tokens.data_ptr(),
        logprobs.data_ptr(),
        log_mass.data_ptr(),
        max(1, min(torch.get_num_threads(), num_rows * num_columns // _ELEMENTS_PER_THREAD)),
    )
    return tokens, logprobs, log_mass


@cache
def _function() -> "ctypes._FuncPointer":
    function = load().fastppo_sample
    shape, out = [_INT64, _INT64, _INT, _POINTER, _INT64, _INT, _POINTER], [_POINTER] * 3
    function.argtypes = [*shape, _DOUBLE, _INT64, _DOUBLE, *out, _INT]
    function.restype = None
    return function
