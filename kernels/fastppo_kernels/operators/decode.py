"""Attention of one new token per sequence; no gradient."""

import torch
from torch import Tensor

from fastppo_kernels import backend as backends
from fastppo_kernels.settings import DecodeSettings


@torch.library.custom_op("fastppo::decode_attention", mutates_args=("keys", "values"))
def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    span: int,
    backend: str,
) -> Tensor:
    """(n, heads, D); k and v are in keys and values afterwards."""
    settings = DecodeSettings(scale=scale, span=span, window=window, softcap=softcap)
    return backends.load(backend).decode_attention(q, k, v, keys, values, positions, settings)


@decode_attention.register_fake
def _(q, k, v, keys, values, positions, scale, window, softcap, span, backend):
    return torch.empty_like(q, memory_format=torch.contiguous_format)
