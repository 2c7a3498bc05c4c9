"""Attention of one new token per sequence in plain PyTorch: the specification of `decode_attention`."""

import torch
from torch import Tensor

from fastppo_kernels.settings import DecodeSettings


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, positions: Tensor, s: DecodeSettings
) -> Tensor:
    """See `fastppo_kernels.decode_attention`; float64 for float64 inputs, else float32 inside."""
    rows = torch.arange(len(q), device=q.device)
    keys[rows, :, positions], values[rows, :, positions] = k, v
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    near_keys, near_values = (x[: len(q), :, : s.span].to(dtype) for x in (keys, values))
    grouped = q.to(dtype).view(len(q), k.shape[1], q.shape[1] // k.shape[1], q.shape[2])
    scores = grouped @ near_keys.transpose(2, 3) * s.scale
    if s.softcap is not None:
        scores = s.softcap * torch.tanh(scores / s.softcap)
    distance = positions[:, None] - torch.arange(s.span, device=q.device)
    live = ((distance >= 0) & (distance < s.reach))[:, None, None]
    scores = scores.masked_fill(~live, float("-inf"))
    seen = near_values.masked_fill(~live.transpose(2, 3), 0.0)  # what is not looked at may be NaN
    return (scores.softmax(dim=-1) @ seen).view(q.shape).to(q.dtype)
