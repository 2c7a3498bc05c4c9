"""The Triton backend, for CUDA and ROCm tensors; nothing imports it until such a tensor arrives."""

from fastppo_kernels.gpu.rows import logprob_rows, logprob_rows_backward, ppo_rows
from fastppo_kernels.gpu.tokens import ppo_tokens

__all__ = ["logprob_rows", "logprob_rows_backward", "ppo_rows", "ppo_tokens"]
