"""Attention of one new token per sequence to those before it, whose keys and values lie in rows of memory."""

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastppo_kernels import checks, operators
from fastppo_kernels.backend import choose_backend, load
from fastppo_kernels.settings import DecodeSettings


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    span: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Keep k and v where `positions` says, and look at every position up to it; softmax in float32, no gradient.

        out_i = softmax(cap(scale * q_i . K)) V   over the positions from positions[i] - window + 1 to positions[i]

    Letters: n sequences in the first n rows of memory, D per head. Query heads h of one group share a head of keys:
    heads / kv_heads of them each (grouped-query attention, arXiv:2305.13245). A sequence's result does not depend on
    the others. Positions that nobody looks at may hold anything, NaN too.

    Args:
        q: (n, heads, D) float32, bfloat16 or float16 (reference: any float).
        k, v: (n, kv_heads, D) of the new tokens.
        keys, values: (rows, kv_heads, positions, D), rows >= n; written at [i, :, positions[i]].
        positions: (n,) int64, each less than `span`; not read on the host.
        scale: of the scores, > 0; None: D ** -0.5.
        window: positions that are looked at, the new one included; None: all.
        softcap: scores become softcap * tanh(score / softcap) (Gemma 2, arXiv:2408.00118); None: as they are.
        span: upper bound of positions + 1, for which memory and programs are sized; None: all of memory.
        backend: "triton", "native" or "reference"; None lets `choose_backend` decide.

    Returns:
        (n, heads, D) of the dtype of q.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or a setting lies outside its range.
    """
    checks.check_float(q=q)
    if q.ndim != 3 or keys.ndim != 4:
        raise ValueError(f"q must be (n, heads, D) and keys 4-D, got {tuple(q.shape)} and {tuple(keys.shape)}")
    (n, heads, D), (rows, kv_heads, num_positions, _) = q.shape, keys.shape
    checks.check_shape((n, kv_heads, D), "(n, kv_heads, D)", k=k, v=v)
    checks.check_shape((rows, kv_heads, num_positions, D), "(rows, kv_heads, positions, D)", keys=keys, values=values)
    checks.check_shape((n,), "(n,)", positions=positions)
    if positions.dtype != torch.int64:
        raise ValueError(f"positions must be int64, got {positions.dtype}; convert them with .long()")
    checks.check_device(q=q, k=k, v=v, keys=keys, values=values, positions=positions)
    span = num_positions if span is None else span
    _check_memory(q, k, v, keys, values)
    if rows < n or heads % max(kv_heads, 1) or not 0 < span <= num_positions:
        raise ValueError(
            f"{n} sequences need as many rows of memory, got {rows}; {heads} heads must be a multiple of {kv_heads} "
            f"kv_heads; span must be in [1, {num_positions}], got {span}"
        )
    s = DecodeSettings(scale=D**-0.5 if scale is None else scale, span=span, window=window, softcap=softcap)
    name = choose_backend("decode_attention", backend, q)
    rows = q.detach(), k.detach(), v.detach(), keys, values, positions
    if not operators.looked_at(*rows):
        increment_version((keys, values))
        return load(name).decode_attention(*rows, s)
    return operators.decode_attention(*rows, s.scale, s.window, s.softcap, s.span, name)


def _check_memory(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> None:
    for name, x in {"k": k, "v": v, "keys": keys, "values": values}.items():
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}")
    for name, x in {"keys": keys, "values": values}.items():
        if x.stride(3) != 1 or x.stride(2) != x.shape[3] or x.stride() != keys.stride():
            raise ValueError(
                f"{name} must hold the positions of a head one after the other, both with the same strides, "
                f"got {x.stride()} of {tuple(x.shape)}"
            )
