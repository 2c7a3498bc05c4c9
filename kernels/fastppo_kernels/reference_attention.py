"""Attention in plain PyTorch: the specification of `decode_attention` and of `packed_attention`."""

import torch
from torch import Tensor

from fastppo_kernels.settings import DecodeSettings, PackedSettings


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


def packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, s: PackedSettings) -> Tensor:
    """See `fastppo_kernels.packed_attention`, a sequence at a time; float64 for float64 inputs, else float32 inside."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    parts = [x.to(dtype).transpose(0, 1).split(cu_seqlens.diff().tolist(), dim=1) for x in (q, k, v)]
    made = [(q[:0] + k[:0].sum() + v[:0].sum())]  # of no tokens too, all three have a gradient
    for queries, keys, values in zip(*parts, strict=True):  # (heads, T, D)
        keys, values = (x.repeat_interleave(group, dim=0) for x in (keys, values))
        distance = torch.arange(queries.shape[1], device=q.device)
        distance = distance[:, None] - distance
        seen = (distance >= 0) & (distance < (len(q) if s.window is None else s.window))
        scores = (queries @ keys.transpose(1, 2) * s.scale).masked_fill(~seen, float("-inf"))
        made.append((scores.softmax(dim=-1) @ values).transpose(0, 1).to(q.dtype))
    return torch.cat(made)
