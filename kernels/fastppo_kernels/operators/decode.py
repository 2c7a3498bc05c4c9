"""Attention of one new token per sequence; no gradient."""

import torch
from torch import Tensor

from fastppo_kernels import backend as backends


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
    module = backends.load(backend)
    return module.decode_attention(
        q, k, v, keys, values, positions, scale=scale, window=window, softcap=softcap, span=span
    )


@decode_attention.register_fake
def _(q, k, v, keys, values, positions, scale, window, softcap, span, backend):
    return torch.empty_like(q, memory_format=torch.contiguous_format)
