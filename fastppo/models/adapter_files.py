"""Adapters on disk, in peft's format: with them, the weights of a classification head."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from fastppo.checks import InputError, require
from fastppo.models.lora import inject, require_peft, settings_of

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"  # peft's file names
PREFIX = "base_model.model."  # of every tensor in them


def save_adapter(model: PreTrainedModel, head: str | None, path: Path) -> None:
    """Write the adapters, and the layer named `head`, in peft's format: PeftModel.from_pretrained loads them."""
    from peft import get_peft_model_state_dict

    name, settings = settings_of(model)
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
    named = json.loads((Path(path) / SETTINGS).read_text(encoding="utf-8")).get("base_model_name_or_path") or ""
    require(
        named == base or (Path(named).is_dir() and Path(named).resolve() == Path(base).resolve()),
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
    inject(model, settings, seed=0)
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
