"""The C++ backend: the functions of `fastppo_kernels.eager`, for float32 and bfloat16 tensors on the CPU."""

from fastppo_kernels.eager import linear_value_rows, moments, sample, token_rewards, value_rows
from fastppo_kernels.native.library import ABI_VERSION, library_path, load
from fastppo_kernels.native.rows import logprob_rows, logprob_rows_backward, ppo_rows, ppo_tokens
from fastppo_kernels.native.sequences import gae

__all__ = [
    "ABI_VERSION",
    "gae",
    "library_path",
    "load",
    "linear_value_rows",
    "moments",
    "sample",
    "token_rewards",
    "value_rows",
    "logprob_rows",
    "logprob_rows_backward",
    "ppo_rows",
    "ppo_tokens",
]
