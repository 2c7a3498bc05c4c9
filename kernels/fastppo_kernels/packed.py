"""Causal attention within sequences that lie one after the other, without padding."""

from torch import Tensor

from fastppo_kernels import checks, operators, reference_attention
from fastppo_kernels.backend import choose_backend
from fastppo_kernels.settings import PackedSettings


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of every token to those of its sequence up to itself, on the CPU; differentiable in q, k and v.

        out_i = softmax(scale q_i . K) V   over the last `window` tokens of the sequence of i up to i

    Letters: N tokens of B sequences, D per head. Query heads of one group share a head of keys: heads / kv_heads of
    them each (arXiv:2305.13245). Nothing is padded, and no (N, N) tensor exists: scores are made again for the
    gradients (arXiv:2307.08691). Of finite numbers a token's result depends, bit for bit, on its own sequence up to
    itself alone, and not on the number of threads. GPUs have flash-attn and `torch.nn.attention.varlen` for this.

    Args:
        q: (N, heads, D) float32 (reference: any float).
        k, v: (N, kv_heads, D), of the dtype of q.
        cu_seqlens: (B + 1,) int32, from 0 to N: sequence b has tokens cu_seqlens[b] to cu_seqlens[b + 1].
        scale: of the scores, > 0; None: D ** -0.5.
        window: tokens that are looked at, the query's own included, >= 1; None: all.
        backend: "native", of float32 alone, or "reference"; None lets `choose_backend` decide.

    Returns:
        (N, heads, D) of the dtype of q.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, a setting lies outside its range, or there is no such
            kernel for the device.
    """
    checks.check_float(q=q)
    if q.ndim != 3 or k.ndim != 3 or q.shape[2] == 0 or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            "q must be (N, heads, D) and k (N, kv_heads, D), heads a multiple of kv_heads, "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    checks.check_shape((q.shape[0], k.shape[1], q.shape[2]), "(N, kv_heads, D)", k=k, v=v)
    for name, x in {"k": k, "v": v}.items():
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}")
    checks.check_packed(cu_seqlens, q.shape[0], None)
    checks.check_device(q=q, k=k, v=v, cu_seqlens=cu_seqlens)
    s = PackedSettings(scale=q.shape[2] ** -0.5 if scale is None else scale, window=window)
    name = choose_backend("packed_attention", backend, q)
    if name == "reference":
        return reference_attention.packed_attention(q, k, v, cu_seqlens, s)
    if name == "triton":
        raise ValueError(
            "packed_attention is for the CPU: on a GPU call flash_attn_varlen_func or torch.nn.attention.varlen, or "
            "pass backend='reference'"
        )
    return operators.PackedAttention.apply(q, k, v, cu_seqlens, s.scale, s.window)  # pyright: ignore[reportReturnType]
