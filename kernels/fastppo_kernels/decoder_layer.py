"""A whole decoder layer and its gradients: float32 on the CPU, in C++.

    y = x + O attention(rotated Q n(x), rotated K n(x), V n(x))      z = y + D (silu(G n'(y)) * U n'(y))

for RMS norms n and n'. The parts are `native`'s. Between them stand neither modules nor autograd's nodes, and gradients
are added up where they stay.
"""

from typing import Any

import torch
from torch import Tensor

from fastppo_kernels import native
from fastppo_kernels.checks import check_shape
from fastppo_kernels.native import LayerSettings, LayerWeights
from fastppo_kernels.native.layer_weights import check_float32, check_weights
from fastppo_kernels.operators.scale import differentiated_once
from fastppo_kernels.settings import PackedSettings


def decoder_layer(
    x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, weights: LayerWeights, settings: LayerSettings
) -> Tensor:
    """z of packed tokens.

    Args:
        x: (N, H) float32. cos, sin: (N, D) rotary angles, no gradient. cu_seqlens: (B + 1,) int32, from 0 to N.

    Returns:
        (N, H), differentiable in x and the weights.

    Raises:
        ValueError: a tensor is not float32 on the CPU, a shape does not fit, or scores are soft-capped.
    """
    weights = _checked(x, cos, sin, cu_seqlens, weights, settings)
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    if torch.is_grad_enabled():
        return _DecoderLayer.apply(x, cos, sin, cu_seqlens, settings, *weights)  # pyright: ignore[reportReturnType]
    y = _attention(x, cos, sin, cu_seqlens, settings, weights)[0]
    return _activation(y, settings, weights)[0]


def _checked(
    x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, w: LayerWeights, s: LayerSettings
) -> LayerWeights:
    """The weights, those of norms contiguous."""
    for name, t in {"x": x, "cos": cos, "sin": sin}.items():
        check_float32(name, t)
        if t.ndim != 2:
            raise ValueError(f"{name} must have two dimensions, got shape {tuple(t.shape)}")
    if cu_seqlens.dtype != torch.int32 or not cu_seqlens.is_cpu:
        raise ValueError(f"cu_seqlens must be int32 on the CPU, got {cu_seqlens.dtype} on {cu_seqlens.device}")
    if s.softcap is not None:
        raise ValueError(f"softcap must be None, got {s.softcap}: a whole layer has no soft-capped scores")
    check_weights(w, cos.shape[1])
    check_shape((len(x), cos.shape[1]), "(N, D)", cos=cos, sin=sin)
    check_shape((len(x), len(w.o)), "(N, H)", x=x)
    norms = ("input_norm", "q_norm", "k_norm", "inner_norm")
    there = {name: getattr(w, name) for name in norms if getattr(w, name) is not None}
    return w._replace(**{name: x.contiguous() for name, x in there.items()})


def _attention(
    x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, s: LayerSettings, w: LayerWeights
) -> tuple[Tensor, ...]:
    """y, and what its gradients need."""
    D, matmul = cos.shape[1], native.matmul
    normed, rates = native.rms_norm(x, w.input_norm, s.eps)
    plain_q, plain_k, v = (
        matmul(normed, weight.T, bias).view(len(x), len(weight) // D, D)
        for weight, bias in ((w.q, w.q_bias), (w.k, w.k_bias), (w.v, w.v_bias))
    )
    (q, q_rates), (k, k_rates) = (
        _head_norm(heads, weight, s.head_eps) for heads, weight in ((plain_q, w.q_norm), (plain_k, w.k_norm))
    )
    q, k = (native.rotate(heads, cos, sin, back=False) for heads in (q, k))
    mixed, origins = native.packed_attention(q, k, v, cu_seqlens, PackedSettings(scale=s.scale, window=s.window))
    y = matmul(mixed.flatten(1), w.o.T, w.o_bias).add_(x)
    plain = (x[:0], x[:0]) if w.q_norm is None else (plain_q, plain_k)  # nothing else needs them
    return y, normed, rates, *plain, q_rates, k_rates, q, k, v, mixed, origins


def _activation(y: Tensor, s: LayerSettings, w: LayerWeights) -> tuple[Tensor, ...]:
    """z, and what its gradients need."""
    inner, rates = native.rms_norm(y, w.inner_norm, s.inner_eps)
    gate, up = native.matmul(inner, w.gate.T), native.matmul(inner, w.up.T)
    made = native.gated(gate, up)
    return native.matmul(made, w.down.T).add_(y), inner, rates, gate, up, made


def queries_keys_values(
    x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, weights: LayerWeights, settings: LayerSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """What attention is called with in `decoder_layer`: (N, heads, D) each."""
    weights = _checked(x, cos, sin, cu_seqlens, weights, settings)
    return _attention(x, cos, sin, cu_seqlens, settings, weights)[7:10]  # pyright: ignore[reportReturnType]


def _head_norm(heads: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(N, heads, D) and the rates of their norm, if there is one."""
    if weight is None:
        return heads, heads.new_empty(0)
    normed, rates = native.rms_norm(heads.flatten(0, 1), weight, eps)
    return normed.view(heads.shape), rates


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, settings: LayerSettings, *weights: Any
    ) -> Tensor:
        y, *kept = _attention(x, cos, sin, cu_seqlens, settings, LayerWeights(*weights))
        z, *rest = _activation(y, settings, LayerWeights(*weights))
        ctx.settings = settings
        ctx.save_for_backward(x, cos, sin, cu_seqlens, *kept, y, *rest, *weights)
        return z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        differentiated_once(grads[0])
        x, cos, sin, cu_seqlens, *saved = ctx.saved_tensors
        count = len(LayerWeights._fields)
        wanted = dict(zip(LayerWeights._fields, ctx.needs_input_grad[-count:], strict=True))
        made = _Gradients(LayerWeights(*saved[-count:]), wanted)
        dx = _backward(made, grads[0].contiguous(), x, cos, sin, cu_seqlens, ctx.settings, saved[:-count])
        return dx, None, None, None, None, *(made.found.get(name) for name in LayerWeights._fields)


class _Gradients:
    """Of the weights, those that are wanted."""

    def __init__(self, weights: LayerWeights, wanted: dict[str, bool]) -> None:
        self.weights, self.wanted = weights, wanted
        self.found: dict[str, Tensor] = {}

    def through(self, name: str, dy: Tensor, x: Tensor, dx: Tensor | None = None) -> Tensor:
        """Of x for y = x W^T + b, added to `dx` if that is given; keeps those of W and b."""
        if self.wanted[name]:
            self.found[name] = native.matmul(dy.T, x)
        if self.wanted.get(f"{name}_bias"):
            self.found[f"{name}_bias"] = dy.sum(0)
        return native.matmul(dy, getattr(self.weights, name), out=dx, accumulate=dx is not None)

    def through_norm(self, name: str, dy: Tensor, x: Tensor, rates: Tensor) -> Tensor:
        dx, self.found[name] = native.rms_norm_backward(dy, x, getattr(self.weights, name), rates)
        return dx


def _backward(
    made: _Gradients, dz: Tensor, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, s: LayerSettings, kept: Any
) -> Tensor:
    normed, rates, plain_q, plain_k, q_rates, k_rates, q, k, v, mixed, origins, y, inner, inner_rates, *rest = kept
    gate, up, gated = rest
    dgate, dup = native.gated_backward(made.through("down", dz, gated), gate, up)
    dinner = made.through("up", dup, inner, made.through("gate", dgate, inner))
    dy = made.through_norm("inner_norm", dinner, y, inner_rates).add_(dz)
    dmixed = made.through("o", dy, mixed.flatten(1)).view(mixed.shape)
    attention = PackedSettings(scale=s.scale, window=s.window)
    dq, dk, dv = native.packed_attention_backward(dmixed, q, k, v, cu_seqlens, attention, mixed, origins)
    dq, dk = (native.rotate(heads, cos, sin, back=True) for heads in (dq, dk))
    if made.weights.q_norm is not None:
        dq = made.through_norm("q_norm", dq.flatten(0, 1), plain_q.flatten(0, 1), q_rates)
        dk = made.through_norm("k_norm", dk.flatten(0, 1), plain_k.flatten(0, 1), k_rates)
    dnormed = made.through("q", dq.reshape(len(x), -1), normed)
    dnormed = made.through("k", dk.reshape(len(x), -1), normed, dnormed)
    dnormed = made.through("v", dv.reshape(len(x), -1), normed, dnormed)
    return made.through_norm("input_norm", dnormed, x, rates).add_(dy)
