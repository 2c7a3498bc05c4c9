"""The Triton backend, for CUDA and ROCm tensors; nothing imports it until such a tensor arrives."""

from fastppo_kernels.gpu.decode import decode_attention
from fastppo_kernels.gpu.rows import logprob_rows, logprob_rows_backward, ppo_rows
from fastppo_kernels.gpu.sampling import sample
from fastppo_kernels.gpu.scale import scale_
from fastppo_kernels.gpu.sequences import gae, moments, token_rewards
from fastppo_kernels.gpu.tokens import ppo_tokens
from fastppo_kernels.gpu.values import linear_value_rows, value_rows
from fastppo_kernels.table import table_sums

__all__ = [
    "decode_attention",
    "gae",
    "linear_value_rows",
    "logprob_rows",
    "logprob_rows_backward",
    "moments",
    "ppo_rows",
    "ppo_tokens",
    "sample",
    "scale_",
    "table_sums",
    "token_rewards",
    "value_rows",
]
