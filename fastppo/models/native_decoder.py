"""Whole decoder layers by fastppo's C++ kernels, where they are made of known parts alone."""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastppo.attention import Packing, backend, plan
from fastppo.models.layer_parts import has_others, parts_of
from fastppo_kernels import operators
from fastppo_kernels.decoder_layer import decoder_layer
from fastppo_kernels.native import LayerSettings

LENGTHS = (3, 4)  # of the sequences that a layer is tried on
TOLERANCE = 1e-5  # relative to the largest number: another way through the parts is further off


class _Seen:
    """The `memory` of a forward that keeps nothing and notes how attention is called."""

    def __init__(self) -> None:
        self.settings: tuple[float, int | None, float | None] | None = None

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None,
        softcap: float | None,
    ) -> None:  # fmt: skip
        self.settings = scaling or q.shape[-1] ** -0.5, window, softcap


def use_native_decoder(model: PreTrainedModel) -> None:
    """Layers whose parts are replaced already; each is tried on numbers first, and left as it is if it does more."""
    for layer in getattr(model.base_model, "layers", None) or ():
        settings = None if "forward" in vars(layer) else _tried(model.base_model, layer)
        if settings is not None:
            layer.native_settings = settings
            layer.forward = MethodType(_forward, layer)


def _forward(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The layer's own where tokens are sampled, something is computed again, or somebody looks at its parts."""
    packing: Packing | None = kwargs.get("packing")
    parts = None if args or packing is None or not _is_alone(layer, hidden_states, kwargs) else parts_of(layer)
    if parts is None or packing is None:
        return type(layer).forward(layer, hidden_states, *args, **kwargs)
    cos, sin = kwargs["position_embeddings"]
    made = decoder_layer(
        hidden_states[0], cos[0], sin[0], packing.padded_seqlens, parts.weights, layer.native_settings
    )  # fmt: skip
    return made[None]


def _is_alone(layer: Any, x: Tensor, given: dict[str, Any]) -> bool:
    recomputes = layer.training and getattr(layer, "gradient_checkpointing", False)
    others = given.get("memory") is not None or given.get("attention_mask") is not None or len(x) != 1
    plain = backend(x.device, x.dtype, None) == "native" and not torch.is_autocast_enabled("cpu")
    return plain and not (recomputes or others or operators.looked_at(x))


@torch.no_grad()
def _tried(body: Any, layer: nn.Module) -> LayerSettings | None:
    """What its attention is called with; None where it is not what `decoder_layer` computes."""
    parts, seen, own = parts_of(layer), _Seen(), type(layer).forward
    if parts is None or has_others(parts, layer):
        return None
    x = torch.randn(1, sum(LENGTHS), parts.q.in_features, generator=torch.Generator().manual_seed(0))
    positions, packing = torch.cat([torch.arange(n) for n in LENGTHS])[None], plan(LENGTHS)
    try:
        cos, sin = angles = body.rotary_emb(x, positions)
        expected = own(layer, x, attention_mask=None, position_embeddings=angles, packing=packing, memory=seen)
        if seen.settings is None or seen.settings[2] is not None:  # soft-capped
            return None
        settings = parts.settings(*seen.settings)
        found = decoder_layer(x[0], cos[0], sin[0], packing.cu_seqlens, parts.weights, settings)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None  # its positions are of another kind
    near = (found - expected[0]).abs().max() <= TOLERANCE * expected.abs().max()
    return settings if bool(near) and found.shape == expected[0].shape else None
