"""What the layers of a decoder are made of, where that is all they are."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fastppo.models.native_layers import is_native_mlp, is_native_norm
from fastppo.models.prepare import Linear


@dataclass(frozen=True)
class LayerParts:
    """Of a layer with C++ norms and gated activation; no parameter of it is left out."""

    index: int
    input_norm: nn.Module
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    head_norms: tuple[nn.Module, nn.Module] | None  # of queries and keys
    inner_norm: nn.Module
    gate: Linear
    up: Linear
    down: Linear

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All that have parameters."""
        plain = (self.input_norm, self.q, self.k, self.v, self.o, self.inner_norm, self.gate, self.up, self.down)
        return (*plain, *(self.head_norms or ()))


def layer_parts(model: PreTrainedModel) -> list[LayerParts] | None:
    """The parts of every layer, in order; None where one is anything but these, or has hooks or adapters."""
    layers = getattr(model.base_model, "layers", None)
    found = [_parts(layer) for layer in layers or ()]
    return None if not found or None in found else found  # pyright: ignore[reportReturnType]


def _parts(layer: Any) -> LayerParts | None:
    try:
        attention, mlp = layer.self_attn, layer.mlp
        norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None
        made = LayerParts(
            attention.layer_idx, layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj,
            attention.o_proj, norms, layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj, mlp.down_proj,
        )  # fmt: skip
    except AttributeError:
        return None
    return made if _is_all(made, layer) else None


def _is_all(parts: LayerParts, layer: nn.Module) -> bool:
    norms = (parts.input_norm, parts.inner_norm, *(parts.head_norms or ()))
    products = (parts.q, parts.k, parts.v, parts.o, parts.gate, parts.up, parts.down)
    return (
        all(is_native_norm(x) for x in norms)
        and is_native_mlp(layer.mlp)  # pyright: ignore[reportArgumentType]
        and all(type(x) is Linear for x in products)
        and all(x.bias is None for x in (parts.gate, parts.up, parts.down))
        and {*layer.parameters()} == {p for x in parts.modules for p in x.parameters()}
        and not any(x._forward_hooks or x._forward_pre_hooks for x in layer.modules())
    )
