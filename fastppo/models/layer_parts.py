"""What the layers of a decoder are made of, where that is all they are."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from fastppo.models.native_layers import epsilon, has_known_forward, is_native_mlp, is_native_norm
from fastppo.models.prepare import Linear
from fastppo_kernels.native import LayerSettings, LayerWeights


@dataclass(frozen=True)
class LayerParts:
    """Of a layer with C++ norms and gated activation; whether they are all, `has_others` says."""

    index: int
    input_norm: Any
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    head_norms: tuple[Any, Any] | None  # of queries and keys
    inner_norm: Any
    gate: Linear
    up: Linear
    down: Linear

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All that have parameters."""
        plain = (self.input_norm, self.q, self.k, self.v, self.o, self.inner_norm, self.gate, self.up, self.down)
        return (*plain, *(self.head_norms or ()))

    @property
    def weights(self) -> LayerWeights:
        q_norm, k_norm = (None, None) if self.head_norms is None else (x.weight for x in self.head_norms)
        return LayerWeights(
            input_norm=self.input_norm.weight,
            q=self.q.weight,
            q_bias=self.q.bias,
            k=self.k.weight,
            k_bias=self.k.bias,
            v=self.v.weight,
            v_bias=self.v.bias,
            q_norm=q_norm,
            k_norm=k_norm,
            o=self.o.weight,
            o_bias=self.o.bias,
            inner_norm=self.inner_norm.weight,
            gate=self.gate.weight,
            up=self.up.weight,
            down=self.down.weight,
        )

    def settings(self, scale: float, window: int | None) -> LayerSettings:
        """With what attention is called with."""
        head_eps = 0.0 if self.head_norms is None else epsilon(self.head_norms[0])
        return LayerSettings(epsilon(self.input_norm), head_eps, epsilon(self.inner_norm), scale, window)


def parts_of(layer: Any) -> LayerParts | None:
    """The parts of a layer as they are now; None where one is of another kind, has been changed, or has hooks.

    Whether they are all that the layer has, and what it does with them, is for others to find out.
    """
    try:
        attention, mlp = layer.self_attn, layer.mlp
        norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None
        made = LayerParts(
            attention.layer_idx, layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj,
            attention.o_proj, norms, layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj, mlp.down_proj,
        )  # fmt: skip
    except AttributeError:
        return None
    known = is_native_mlp(mlp) and has_known_forward(attention) and _are_known(made)
    return made if known and not any(is_watched(x) for x in layer.modules()) else None


def numbers_of(attention: nn.Module) -> dict[str, Any]:
    """What its forward may read beside its parts and its config."""
    return {name: x for name, x in vars(attention).items() if x is None or type(x) in (int, float)}


def is_watched(module: nn.Module) -> bool:
    """Whether a hook hears of its calls or gradients."""
    own = [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks]
    return any(own) or bool(nn.modules.module._has_any_global_hook())


def _are_known(parts: LayerParts) -> bool:
    norms = (parts.input_norm, parts.inner_norm, *(parts.head_norms or ()))
    products = (parts.q, parts.k, parts.v, parts.o, parts.gate, parts.up, parts.down)
    unbiased = (parts.gate, parts.up, parts.down)
    return (
        all(is_native_norm(x) for x in norms)
        and all(type(x) is Linear and "forward" not in vars(x) for x in products)
        and all(x.bias is None for x in unbiased)
    )


def has_others(parts: LayerParts, layer: nn.Module) -> bool:
    """Whether the layer has parameters that are not of these parts."""
    return {*layer.parameters()} != {p for x in parts.modules for p in x.parameters()}
