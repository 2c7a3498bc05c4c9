"""Several roles on one set of weights: a frozen base, and for each role its own adapters (LoRA, arXiv:2106.09685).

Every role has modules of its own around the base's tensors, as a deep copy that copies no tensor. So there is no active
adapter to switch: forwards and backwards of different roles may interleave, recomputation under gradient checkpointing
finds the adapters it began with, and the reference, which has none, computes what the base does bit for bit.
"""

import copy
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastppo.checks import InputError, require
from fastppo.config import MemoryConfig


def require_peft() -> None:
    """
    Raises:
        ValueError: it is not installed.
    """
    there = importlib.util.find_spec("peft") is not None
    require(there, "adapters need the package peft: pip install 'fastppo[lora]'")


def adapt(model: PreTrainedModel, config: MemoryConfig, *, seed: int = 0) -> PreTrainedModel:
    """Freeze `model` and put trainable float32 adapters, which change nothing yet (B = 0), around its linear layers.

    `seed`: of the adapters' A; the global generator is not touched.

    Raises:
        ValueError: peft is not installed, or `lora_targets` names what is no linear layer below the heads.
    """
    require_peft()
    from peft import LoraConfig

    require(not is_adapted(model), f"this {type(model).__name__} has adapters already")
    names = list(config.lora_targets)
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # pyright: ignore[reportArgumentType]  any number will do
        target_modules="all-linear" if names == ["all-linear"] else names,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM",
    )
    return inject(model, lora, seed)


def adapt_like(model: PreTrainedModel, other: PreTrainedModel, *, seed: int = 0) -> PreTrainedModel:
    """The same, with the rank, scale and layers of the adapters of `other`."""
    return inject(model, copy.deepcopy(settings_of(other)[1]), seed)


def bare(model: PreTrainedModel) -> PreTrainedModel:
    """What `model` is without its adapters: new modules around the same tensors."""
    base: Any = _around_the_tensors_of(model, trainable=True)
    for name, layer in list(_adapted_layers(base)):
        base.set_submodule(name, layer.get_base_layer())
    base._hf_peft_config_loaded = False
    vars(base).pop("peft_config", None)
    return base


def reference_of(policy: PreTrainedModel) -> PreTrainedModel:
    """What the policy computes now, whatever its adapters become: its base, with a copy of those that do something."""
    fresh = not any(bool(w.count_nonzero()) for name, w in policy.named_parameters() if ".lora_B." in name)
    return bare(policy) if fresh else _around_the_tensors_of(policy, trainable=False)


def is_adapted(model: nn.Module) -> bool:
    """Whether the model has adapters."""
    return hasattr(model, "peft_config")


def unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model inside a `peft.PeftModel`, with its adapters; any other model as it is.

    Raises:
        ValueError: peft changed it in another way than by one LoRA adapter on linear layers below the heads.
    """
    if hasattr(model, "get_base_model"):
        settings, model = model.peft_config, model.get_base_model()
        model.peft_config, model._hf_peft_config_loaded = settings, True  # saving it then saves the adapter
    if is_adapted(model):
        _check(model)
    return model


@torch.no_grad()
def plain_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state_dict of `model` without adapters, W + B A * alpha / rank for W, computed in float32 and rounded once.

    The model is left as it is. What adapters change is merged in host memory, one layer at a time, wherever base and
    adapters are; what they do not is not copied.
    """
    if not is_adapted(model):
        return model.state_dict()
    out = bare(model).state_dict()
    for name, layer in _adapted_layers(model):
        merged = _on_host(layer)
        merged.merge()
        for key, weight in merged.get_base_layer().state_dict().items():
            out[f"{name}.{key}"] = weight.to(out[f"{name}.{key}"].dtype)
    return out


def inject(model: Any, settings: Any, seed: int) -> PreTrainedModel:
    """Freeze `model` and put fresh float32 adapters on it as peft's config `settings` says.

    Raises:
        ValueError: they would be on what is no linear layer below the heads, or not all that trains.
    """
    settings.init_lora_weights = True  # others begin by changing the base
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            model.add_adapter(settings, "default")
        except ValueError as error:
            raise InputError(f"no adapters on {type(model).__name__}: {error}") from error
    for p in model.parameters():
        p.data = p.data.float() if p.requires_grad else p.data
    _check(model)
    return model


def _check(model: PreTrainedModel) -> None:
    """The weights of embedding and LM head are read as they are, and what others share must not learn."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = dict(_adapted_layers(model))
    ours = [id(module) for module in model.base_model.modules()]
    wrong = [n for n, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)] + [
        name
        for name, layer in layers.items()
        if not (isinstance(layer, LoraLayer) and isinstance(layer.get_base_layer(), nn.Linear | Conv1D))
        or layer.merged
        or layer.disable_adapters
        or id(layer) not in ours
        or len(layer.active_adapters) != 1
    ]
    wrong += list(model.peft_config)[1:]  # pyright: ignore[reportArgumentType, reportCallIssue]
    wrong += [name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name]
    require(
        bool(layers) and not wrong,
        f"adapters must be one LoRA, not merged, on linear layers below the heads, and nothing else may train; "
        f"{type(model).__name__} has {wrong[0] if wrong else 'none'!r}",
    )


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of every layer with an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))


def _around_the_tensors_of(model: PreTrainedModel, *, trainable: bool) -> PreTrainedModel:
    """New modules around the same tensors; those that learn are copied unless `trainable`."""
    shared = [p for p in model.parameters() if trainable or not p.requires_grad] + list(model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def _on_host(layer: nn.Module) -> Any:
    """A copy in host memory, in float32; where `layer` is, which may be more than one device, nothing is made."""
    tensors = [*layer.parameters(), *layer.buffers()]
    copies = {id(x): torch.empty_like(x, dtype=torch.float32, device="cpu").copy_(x) for x in tensors}
    parameters = {id(x): nn.Parameter(copies[id(x)], requires_grad=False) for x in layer.parameters()}
    return copy.deepcopy(layer, copies | parameters)


def settings_of(model: Any) -> tuple[str, Any]:
    """Name and peft's config of the model's one adapter."""
    ((name, settings),) = model.peft_config.items()
    return name, settings
