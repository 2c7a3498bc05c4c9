"""Layers by fused kernels: fastppo's own on a CPU, Liger's, or those that torch.compile makes. Numbers differ from
PyTorch's by rounding.
"""

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fastppo.attention import UNTRACED, packed_attention
from fastppo.checks import require
from fastppo.config import LayersConfig
from fastppo.models.native_decoder import use_native_decoder
from fastppo.models.native_layers import use_native
from fastppo.models.prepare import Linear

CHECKPOINTS_CALLS = "__call__" in vars(GradientCheckpointingLayer)  # of layers: transformers 5.17; 5.23 forwards
VARIANTS = 64  # of one layer's code: gradients or not, sampling, with adapters or without


def require_fused(config: LayersConfig, device: torch.device) -> None:
    """
    Raises:
        ValueError: kernels of Liger are asked for, and the package or the GPU is not there; or the CPU's, elsewhere.
    """
    require(
        config.fused != "native" or device.type == "cpu",
        f"layers.fused = 'native' is of kernels for CPUs, and this run's models are on {device.type!r}: use 'liger', "
        "'compile' or 'none'",
    )
    if config.fused != "liger":
        return
    there = importlib.util.find_spec("liger_kernel") is not None
    require(there, "layers.fused = 'liger' needs the package liger-kernel: pip install 'fastppo[liger]'")
    require(
        device.type == "cuda",
        f"layers.fused = 'liger' is of kernels for GPUs, and this run's models are on {device.type!r}: use 'compile' "
        "or 'none'",
    )


def fuse_layers(model: PreTrainedModel, config: LayersConfig, home: torch.device | None = None) -> None:
    """Change how this model, and no other of its class, computes its layers. A copy of it has to be changed by itself.

    Scoring and training go through the same layers, so the ratio of a policy to itself stays what it was.

    Args:
        home: where it computes, which is not where it is while it waits in host memory; None: where it is.

    Raises:
        ValueError: as `require_fused`, or the architecture is not known there, or not float32 for 'native'.
    """
    require_fused(config, home or model.device)
    if config.fused == "liger":
        use_liger(model)
    elif config.fused == "compile":
        compile_layers(model)
    elif config.fused == "native":
        use_native(model, _with_names)
        use_native_decoder(model)


def compile_layers(model: PreTrainedModel) -> None:
    """Compile the decoder layers for any number of tokens; attention, whose packing is different in every micro-batch,
    runs as it is."""
    AttentionInterface.register(UNTRACED, torch.compiler.disable(packed_attention))
    model.set_attn_implementation(UNTRACED)
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = nn.Linear  # pyright: ignore[reportAttributeAccessIssue]  the compiler has its own products
        if isinstance(module, GradientCheckpointingLayer):
            forward = type(module).forward
            plain: Any = forward if CHECKPOINTS_CALLS else vars(forward)["__wrapped__"]  # without the checkpoint around
            compiled: Any = torch.compile(plain, dynamic=True, recompile_limit=VARIANTS)  # pyright: ignore
            module.forward = MethodType(compiled if CHECKPOINTS_CALLS else _checkpointed(compiled), module)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """As transformers does it, with `forward` in the place of the layer's own: what is compiled is inside the
    checkpoint, since the compiler leaves out what goes through one from outside."""

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if layer.gradient_checkpointing and layer.training:
            return layer._gradient_checkpointing_func(partial(forward, layer, **kwargs), *args)
        return forward(layer, *args, **kwargs)

    return call


def use_liger(model: PreTrainedModel) -> None:
    """Liger's norms, rotary positions and gated activations.

    Liger gives them to the instance, but for rotary positions, and puts them in the place of the classes and functions
    of transformers' module too; there what was is put back, and the layers that call one of them by name get it.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance  # pyright: ignore[reportMissingImports]
    from liger_kernel.transformers.monkey_patch import (  # pyright: ignore[reportMissingImports]
        MODEL_TYPE_TO_APPLY_LIGER_FN,
    )

    known = model.config.model_type in MODEL_TYPE_TO_APPLY_LIGER_FN
    require(known, f"liger-kernel has none for {model.config.model_type!r}: set layers.fused to 'compile' or 'none'")
    names = vars(sys.modules[type(model).__module__])
    before = dict(names)
    try:
        _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
        replaced = {name: x for name, x in names.items() if x is not before.get(name)}
    finally:
        names.update(before)
    for module in model.modules():
        forward: Any = type(module).forward
        if getattr(forward, "__globals__", None) is names and replaced.keys() & {*forward.__code__.co_names}:
            module.forward = MethodType(_with_names(forward, replaced), module)


def _with_names(function: FunctionType, names: dict[str, Any]) -> FunctionType:
    """The same, in which global `names` mean something else."""
    made = FunctionType(
        function.__code__, function.__globals__ | names, function.__name__, function.__defaults__, function.__closure__
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made
