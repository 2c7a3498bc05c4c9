"""The C++ backend: the functions of `fastppo_kernels.eager`, for float32 and bfloat16 tensors on the CPU."""

from fastppo_kernels.native.decode import decode_attention
from fastppo_kernels.native.decoder import DecoderLayers, Layer
from fastppo_kernels.native.isa import available_isas
from fastppo_kernels.native.layer_weights import LayerSettings, LayerWeights
from fastppo_kernels.native.layers import gated, gated_backward, rms_norm, rms_norm_backward, rotate
from fastppo_kernels.native.library import ABI_VERSION, library_path, load
from fastppo_kernels.native.matmul import matmul
from fastppo_kernels.native.packed import packed_attention, packed_attention_backward
from fastppo_kernels.native.rows import logprob_rows, logprob_rows_backward, ppo_rows, ppo_tokens
from fastppo_kernels.native.sampling import sample
from fastppo_kernels.native.sequences import gae, moments, token_rewards
from fastppo_kernels.native.tables import table_sums
from fastppo_kernels.native.values import linear_value_rows, value_rows

__all__ = [
    "ABI_VERSION",
    "DecoderLayers",
    "Layer",
    "LayerSettings",
    "LayerWeights",
    "available_isas",
    "decode_attention",
    "gae",
    "gated",
    "gated_backward",
    "library_path",
    "linear_value_rows",
    "load",
    "logprob_rows",
    "logprob_rows_backward",
    "matmul",
    "moments",
    "packed_attention",
    "packed_attention_backward",
    "ppo_rows",
    "ppo_tokens",
    "rms_norm",
    "rms_norm_backward",
    "rotate",
    "sample",
    "table_sums",
    "token_rewards",
    "value_rows",
]
