"""Whole decoder layers by fastppo's C++ kernels, where they are made of known parts alone."""

import logging
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastppo.attention import Packing, backend, plan
from fastppo.models.facts import context_length
from fastppo.models.layer_parts import LayerParts, has_others, is_watched, numbers_of, parts_of
from fastppo.models.native_layers import UNLIKE
from fastppo_kernels import operators
from fastppo_kernels.decoder_layer import decoder_layer, queries_keys_values
from fastppo_kernels.native import LayerSettings, LayerWeights

LOG = logging.getLogger(__name__)
LENGTHS = (3, 4)  # of the sequences that a layer is tried on: at the first positions, and at the last
TOLERANCE = 1e-5  # relative to the largest number: another way through the parts is further off


class NativeLayer(NamedTuple):
    """A layer that runs whole."""

    number: int
    weights: LayerWeights
    settings: LayerSettings


class Tried(NamedTuple):
    """What its attention was called with when a layer was found to be what `decoder_layer` computes."""

    scale: float
    window: int | None
    numbers: dict[str, Any]
    """Of its attention, then."""


class _Seen:
    """The `memory` of a forward that keeps nothing and notes how attention is called."""

    def __init__(self) -> None:
        self.inputs: tuple[Tensor, ...] = ()
        self.settings: tuple[float, int | None, float | None] | None = None

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None,
        softcap: float | None,
    ) -> None:  # fmt: skip
        self.inputs = q, k, v
        self.settings = q.shape[-1] ** -0.5 if scaling is None else scaling, window, softcap


def use_native_decoder(model: PreTrainedModel) -> None:
    """Layers whose parts are replaced already; each is tried on numbers first, and left as it is if it does more."""
    layers: Any = getattr(model.base_model, "layers", None) or ()
    for layer in layers:
        tried = None if "forward" in vars(layer) else _tried(model, layer)
        if tried is not None:
            layer.tried_natively = tried
            layer.forward = MethodType(_forward, layer)
    whole = sum(hasattr(layer, "tried_natively") for layer in layers)
    LOG.info("%d of %d layers of %s run whole in C++", whole, len(layers), type(model).__name__)


def native_layers_of(model: PreTrainedModel) -> list[NativeLayer] | None:
    """All layers of a body, in order; None where one does not run whole now, or somebody watches it."""
    body: Any = model.base_model
    layers, found = getattr(body, "layers", None) or (), list[NativeLayer]()
    for layer in layers:
        parts = _whole(layer)
        if parts is None or has_others(parts, layer):
            return None
        found.append(_native(layer, parts))
    alone = not is_watched(body) and backend(model.device, model.dtype, None) == "native"
    return found if found and alone else None


def _whole(layer: Any) -> LayerParts | None:
    """The parts of a layer that is still what was tried."""
    tried: Tried | None = getattr(layer, "tried_natively", None)
    if tried is None or numbers_of(layer.self_attn) != tried.numbers:
        return None
    return parts_of(layer)


def _native(layer: Any, parts: LayerParts) -> NativeLayer:
    """With the weights and epsilons of now."""
    tried: Tried = layer.tried_natively
    return NativeLayer(parts.index, parts.weights, parts.settings(tried.scale, tried.window))


def _forward(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The layer's own where tokens are sampled, something is computed again, or somebody looks at its parts."""
    packing: Packing | None = kwargs.get("packing")
    parts = None if args or packing is None or not _is_alone(layer, hidden_states, kwargs) else _whole(layer)
    if parts is None or packing is None:
        return type(layer).forward(layer, hidden_states, *args, **kwargs)
    cos, sin = kwargs["position_embeddings"]
    _, weights, settings = _native(layer, parts)
    return decoder_layer(hidden_states[0], cos[0], sin[0], packing.padded_seqlens, weights, settings)[None]


def _is_alone(layer: Any, x: Tensor, given: dict[str, Any]) -> bool:
    recomputes = layer.training and getattr(layer, "gradient_checkpointing", False)
    others = len(x) != 1 or any(given.get(name) is not None for name in ("memory", "past_key_values", "attention_mask"))
    plain = backend(x.device, x.dtype, None) == "native" and not torch.is_autocast_enabled("cpu")
    return plain and not (recomputes or others or operators.looked_at(x))


def _tried(model: PreTrainedModel, layer: nn.Module) -> Tried | None:
    """What its attention is called with; None where it is not what `decoder_layer` computes."""
    parts = parts_of(layer)
    if parts is None or has_others(parts, layer):
        return None
    try:
        return _compared(model, layer, parts)
    except UNLIKE as error:
        LOG.info("a layer of %s runs by its modules: %s", type(model).__name__, error)
        return None


@torch.no_grad()
def _compared(model: PreTrainedModel, layer: Any, parts: LayerParts) -> Tried | None:
    """The queries, keys and values, and what the layer adds to its input."""
    seen, body, end = _Seen(), model.base_model, context_length(model)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, sum(LENGTHS), parts.q.in_features, generator=generator, dtype=torch.float32, device="cpu")
    first, last = (torch.arange(n, device="cpu") for n in LENGTHS)
    positions, packing = torch.cat([first, last + max(0, end - len(last))])[None], plan(LENGTHS, "cpu")
    cos, sin = angles = body.rotary_emb(x, positions)  # pyright: ignore[reportCallIssue]
    z = type(layer).forward(
        layer, x, attention_mask=None, position_ids=positions, position_embeddings=angles, packing=packing, memory=seen
    )
    if seen.settings is None or seen.settings[2] is not None:  # soft-capped
        return None
    given = x[0], cos[0], sin[0], packing.cu_seqlens, parts.weights
    scale, window, _ = seen.settings
    settings = parts.settings(scale, window)
    pairs = [*zip(queries_keys_values(*given, settings), seen.inputs, strict=True)]
    pairs.append((decoder_layer(*given, settings) - x[0], z[0] - x[0]))
    same = all(_near(found, expected) for found, expected in pairs)
    return Tried(scale, window, numbers_of(layer.self_attn)) if same else None


def _near(found: Tensor, expected: Tensor) -> bool:
    """Zeros prove nothing."""
    largest = expected.abs().max()
    return (
        found.shape == expected.shape
        and bool(largest > 0)
        and bool((found - expected).abs().max() <= TOLERANCE * largest)
    )
