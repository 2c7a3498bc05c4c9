"""Decode steps on a CPU as one call into C++: of a small model's step, modules and calls take half the time.

Only where layers are fused in C++ already (`layers.fused = "native"`) and are made of nothing else. Every call of
`generate` tries it on its first step, which the modules make too.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastppo import models
from fastppo.rollout.kv import Decode
from fastppo_kernels import native
from fastppo_kernels.linear import runs_native

TOLERANCE = 1e-4  # of hidden states, relative to the largest: sums in another order are nearer


class LayerSteps:
    """Steps of a policy through the parts of its layers; `settings` are those that its attention was called with."""

    def __init__(self, policy: PreTrainedModel, parts: list[models.LayerParts], step: Decode) -> None:
        self.body: Any = policy.base_model
        self.layers = native.DecoderLayers([_layer(x, step) for x in parts])

    def __call__(self, ids: Tensor, step: Decode) -> Tensor:
        """Hidden states (n, H) after the tokens (n,), whose keys and values are kept."""
        body, positions = self.body, step.positions
        x: Tensor = body.embed_tokens(ids)
        cos, sin = body.rotary_emb(x[None], positions[None])
        return body.norm(self.layers.step(x, cos[0], sin[0], positions, step.span))


def layer_steps(policy: PreTrainedModel, ids: Tensor, step: Decode, hidden: Tensor) -> LayerSteps | None:
    """What makes the same hidden states from these tokens as the modules just did; None where nothing does."""
    parts = models.layer_parts(policy)
    if parts is None or {x.index for x in parts} != {*step.seen} or not runs_native(hidden):
        return None
    try:
        made = LayerSteps(policy, parts, step)
        found = made(ids, step)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None  # its positions are of another kind
    return made if (found - hidden).abs().max() <= TOLERANCE * hidden.abs().max() else None


def _layer(x: models.LayerParts, step: Decode) -> native.Layer:
    _require_plain(*x.weights)
    return native.Layer(x.weights, x.settings(*step.seen[x.index]), *step.kv.layers[x.index])


def _require_plain(*weights: Tensor | None) -> None:
    """
    Raises:
        ValueError: one is not what the C++ reads.
    """
    for x in weights:
        if x is not None and (x.dtype != torch.float32 or not x.is_cpu or not x.is_contiguous()):
            raise ValueError(f"a weight is not contiguous float32 on the CPU, got {x.dtype} on {x.device}")
