"""Decode steps on a CPU as one call into C++: a small model's step is mostly modules and calls.

Only where every layer runs whole in C++ already (`layers.fused = "native"`, `models.native_decoder`). Every call of
`generate` compares the first step with what the modules make.
"""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from fastppo import models
from fastppo.rollout.kv import Decode
from fastppo_kernels import native, operators

TOLERANCE = 1e-4  # of hidden states, relative to the largest: sums in another order are nearer


class LayerSteps:
    """Steps of a policy through the parts of its layers."""

    def __init__(self, policy: PreTrainedModel, layers: list[models.NativeLayer], step: Decode) -> None:
        self.body: Any = policy.base_model
        self.layers = native.DecoderLayers([native.Layer(*x[1:], *step.kv.layers[x.number]) for x in layers])

    def __call__(self, ids: Tensor, step: Decode) -> Tensor:
        """Hidden states (n, H) after the tokens (n,), whose keys and values are kept."""
        body, positions = self.body, step.positions
        x: Tensor = body.embed_tokens(ids)
        cos, sin = body.rotary_emb(x[None], positions[None])
        return body.norm(self.layers.step(x, cos[0], sin[0], positions, step.span))


def layer_steps(policy: PreTrainedModel, step: Decode) -> LayerSteps | None:
    """Of a policy whose layers all run whole, whose keys and values are in memory; None of others."""
    layers = models.native_layers_of(policy)
    watched = operators.looked_at()  # by a profiler, say, who wants to see the parts of a step
    if watched or layers is None or {x.number for x in layers} != {*step.kv.layers}:
        return None
    try:
        return LayerSteps(policy, layers, step)
    except ValueError:
        return None  # layers of several shapes


def agree(found: Tensor, hidden: Tensor) -> bool:
    """Whether hidden states are those of the modules."""
    return bool((found - hidden).abs().max() <= TOLERANCE * hidden.abs().max())
