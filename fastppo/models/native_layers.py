"""Layers by fastppo's C++ kernels: RMSNorm, gated activations and rotary positions of a float32 model on a CPU."""

import ctypes
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastppo.checks import require
from fastppo_kernels import layers

ROTARY = "apply_rotary_pos_emb"
UNLIKE = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError, ctypes.ArgumentError)
"""What a module raises that takes or gives something else than the kernel that is tried in its place."""
SCALES = (1e-3, 1.0, 1e4)  # of the numbers it is tried on
TOLERANCE = 1e-5  # of a replacement, relative to the largest number: another formula is further off


def use_native(model: PreTrainedModel, with_names: Callable[..., Any]) -> None:
    """Replace what is recognized by what it computes: every replacement is tried on numbers of several magnitudes.

    Args:
        with_names: gives a function other globals.

    Raises:
        ValueError: the model is not float32, or nothing in it is known.
    """
    require(
        model.dtype == torch.float32,
        f"layers.fused = 'native' is of float32 models, and this one is {model.dtype}: use 'compile' or 'none'",
    )
    names = vars(sys.modules[type(model).__module__])
    rotates = ROTARY in names and _is_rotary(names[ROTARY])
    count = sum(_replace(module) for module in model.modules())
    for module in model.modules():
        forward: Any = type(module).forward
        changed = "forward" in vars(module)  # by somebody else, or here before
        if (
            rotates
            and not changed
            and getattr(forward, "__globals__", None) is names
            and ROTARY in forward.__code__.co_names
        ):
            rotating: Any = with_names(forward, {ROTARY: rotary})
            rotating.rotates_natively = True
            module.forward = MethodType(rotating, module)
            count += 1
    require(
        count > 0,
        f"layers.fused = 'native' knows no layer of {type(model).__name__}: use 'compile' or 'none'",
    )


def _replace(module: Any) -> bool:
    """Whether one of the kernels does what this module does; then it is what runs."""
    if type(module).__name__.endswith("RMSNorm") and isinstance(getattr(module, "weight", None), nn.Parameter):
        forward, width = _norm, module.weight.shape[0]
    elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        forward, width = _mlp, module.gate_proj.in_features
    else:
        return False
    if not _same(module.forward, MethodType(forward, module), width):
        return False
    module.forward = MethodType(forward, module)
    return True


@torch.no_grad()
def _same(one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], width: int) -> bool:
    """Also where an epsilon counts, and where what is clamped would be."""
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    for scale in SCALES:
        try:
            expected, found = one(scale * x), other(scale * x)
        except UNLIKE:
            return False
        if found.shape != expected.shape or not (found - expected).abs().max() <= TOLERANCE * expected.abs().max():
            return False
    return True


def is_native_norm(module: nn.Module) -> bool:
    return getattr(module.forward, "__func__", None) is _norm


def is_native_mlp(module: nn.Module) -> bool:
    return getattr(module.forward, "__func__", None) is _mlp


def has_known_forward(attention: nn.Module) -> bool:
    """Whether it is its class's, or that with other rotary positions."""
    own: Any = vars(attention).get("forward")
    return own is None or hasattr(getattr(own, "__func__", None), "rotates_natively")


def epsilon(norm: Any) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def _norm(module: Any, hidden_states: Tensor) -> Tensor:
    return layers.rms_norm(hidden_states, module.weight, epsilon(module))


def _mlp(module: Any, x: Tensor) -> Tensor:
    return module.down_proj(layers.gated(module.gate_proj(x), module.up_proj(x)))


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """transformers' function of this name: q and k (B, heads, N, D), or (B, N, heads, D) where the dimension is 2."""
    x, y = (x.transpose(1, 2) if unsqueeze_dim == 1 else x for x in (q, k))
    cos, sin = (c.expand(x.shape[0], *c.shape[1:]).flatten(0, 1) for c in (cos, sin))
    made = (layers.rotate(z.flatten(0, 1), cos, sin).view(z.shape) for z in (x, y))
    q, k = (z.transpose(1, 2) if unsqueeze_dim == 1 else z for z in made)
    return q, k


def _is_rotary(function: Callable[..., tuple[Tensor, Tensor]]) -> bool:
    """One that rotates a part of a head, by angles of its width, is another."""
    whole, part = _on_heads(rotary, 4), _on_heads(function, 2)
    return _same(_on_heads(function, 4), whole, 4) and not _same(part, part, 4)


def _on_heads(function: Callable[..., tuple[Tensor, Tensor]], width: int) -> Callable[[Tensor], Tensor]:
    """The rotation of (2, 3, 4) as two sequences of three tokens, a head each, by angles that are not alike."""

    def call(x: Tensor) -> Tensor:
        angles = torch.arange(6.0 * width, dtype=torch.float32, device="cpu").view(2, 3, width)
        q, k = function(x[:, None], 2 * x[:, None], angles.cos(), angles.sin())
        return torch.cat([q, k])

    return call
