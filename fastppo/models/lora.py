"""Several roles on one set of weights: a frozen base, and for each role its own adapters (LoRA, arXiv:2106.09685).

Every role has modules of its own around the base's tensors, as a deep copy that copies no tensor. So there is no active
adapter to switch: forwards and backwards of different roles may interleave, recomputation under gradient checkpointing
finds the adapters it began with, and the reference, which has none, computes what the base does bit for bit.
"""

import copy
import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastppo.checks import InputError, require
from fastppo.config import MemoryConfig

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"  # peft's file names
PREFIX = "base_model.model."  # of every tensor in them


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
    return _inject(model, lora, seed)


def adapt_like(model: PreTrainedModel, other: PreTrainedModel, *, seed: int = 0) -> PreTrainedModel:
    """The same, with the rank, scale and layers of the adapters of `other`."""
    return _inject(model, copy.deepcopy(_settings(other)[1]), seed)


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

    The model is left as it is; what no adapter changes is not copied.
    """
    if not is_adapted(model):
        return model.state_dict()
    out = bare(model).state_dict()
    for name, layer in _adapted_layers(model):
        merged = copy.deepcopy(layer).float()
        merged.merge()
        for key, weight in merged.get_base_layer().state_dict().items():
            out[f"{name}.{key}"] = weight.to(out[f"{name}.{key}"].dtype)
    return out


def save_adapter(model: PreTrainedModel, head: str | None, path: Path) -> None:
    """Write the adapters, and the layer named `head`, in peft's format: PeftModel.from_pretrained loads them."""
    from peft import get_peft_model_state_dict

    name, settings = _settings(model)
    settings = copy.deepcopy(settings)
    settings.inference_mode = True
    if isinstance(settings.target_modules, set):
        settings.target_modules = sorted(settings.target_modules)  # one run, one file
    weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    if head is not None:
        weights |= {f"{head}.{key}": w for key, w in model.get_submodule(head).state_dict().items()}
        settings.task_type, settings.modules_to_save = "TOKEN_CLS", [head]
    path.mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + key: w.detach().contiguous() for key, w in weights.items()}
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    settings.save_pretrained(str(path))


def is_saved_at(path: str) -> bool:
    """Whether a folder holds adapters in peft's format."""
    return (Path(path) / SETTINGS).is_file()


def require_base(path: str, base: str) -> None:
    """
    Raises:
        ValueError: the adapters at `path` are of another base than the one named.
    """
    named = json.loads((Path(path) / SETTINGS).read_text(encoding="utf-8")).get("base_model_name_or_path")
    require(
        named == base or (named is not None and Path(named).is_dir() and Path(named).resolve() == Path(base).resolve()),
        f"the adapter at {path!r} was trained on {named!r}, the base here is {base!r}: if they are the same model, "
        f"write this name into base_model_name_or_path of its {SETTINGS}",
    )


def num_labels_at(path: str, heads: Sequence[str]) -> int:
    """Rows of the classification head that is saved beside the adapters.

    Raises:
        ValueError: there is none.
    """
    with safe_open(Path(path) / WEIGHTS, "pt") as file:
        names = [name for name in (f"{PREFIX}{head}.weight" for head in heads) if name in file.keys()]  # noqa: SIM118
        require(
            len(names) == 1, f"the adapter at {path!r} has no head named {' or '.join(heads)}, so it scores nothing"
        )
        return file.get_slice(names[0]).get_shape()[0]


def load_adapter(model: PreTrainedModel, head: str, path: str) -> PreTrainedModel:
    """Put saved adapters on `model`, which has none, and the saved weights into its layer named `head`.

    Raises:
        ValueError: they are of another model, or more than adapters and a head.
    """
    require_peft()
    from peft import PeftConfig, set_peft_model_state_dict

    settings: Any = PeftConfig.from_pretrained(path)
    settings.modules_to_save, settings.inference_mode = None, False
    _inject(model, settings, seed=0)
    weights = {key.removeprefix(PREFIX): w for key, w in load_file(Path(path) / WEIGHTS).items()}
    of_head = {key: weights.pop(key) for key in list(weights) if key.startswith(f"{head}.")}
    try:
        found = set_peft_model_state_dict(model, weights)
        model.get_submodule(head).load_state_dict({k.removeprefix(f"{head}."): w for k, w in of_head.items()})
    except RuntimeError as error:
        raise InputError(f"the adapter at {path!r} does not fit the base: {' '.join(str(error).split())}") from error
    wrong = [*(key for key in found.missing_keys if ".lora_" in key), *found.unexpected_keys]
    require(not wrong, f"the adapter at {path!r} does not fit the base: {wrong[:1]} is only in one of them")
    return model


def _inject(model: Any, settings: Any, seed: int) -> PreTrainedModel:
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


def _settings(model: Any) -> tuple[str, Any]:
    """Name and peft's config of the model's one adapter."""
    ((name, settings),) = model.peft_config.items()
    return name, settings
