"""Checkpoints and tokenizers on disk: read with nothing missing, damaged or filled with noise; written whole."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fastppo.checks import InputError, require
from fastppo.hub import require_there
from fastppo.models import adapter_files, lora
from fastppo.models.heads import head_name
from fastppo.models.prepare import dropout_keys, remember_dropout

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("vocab.json", "vocab.txt"),
)


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint."""
    require_there(path)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises Exception itself
        reason = _first_line(error) if has_tokenizer(path) else "it has none of its files"
        ways = "copy tokenizer.json and tokenizer_config.json there, or call tokenizer.save_pretrained on it"
        raise InputError(f"no usable tokenizer at {path!r} ({reason}): {ways}") from error


def has_tokenizer(path: str) -> bool:
    """Whether a checkpoint brings its own tokenizer (a hub name is assumed to)."""
    folder = Path(path)
    return not folder.is_dir() or any((folder / name).exists() for name in TOKENIZER_FILES)


def save(
    model: PreTrainedModel,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a folder that the AutoModel classes load: safetensors, config and, when given, the tokenizer.

    The config has the dropout that the model came with. Adapters are merged into a copy of the weights they change, and
    written beside it as `adapter/` in peft's format.

    Args:
        weights: parameters to write instead of the model's own, by name; those it has not are the model's.
    """
    model = model if weights is None else _around(model, weights)
    plain = lora.bare(model) if lora.is_adapted(model) else model
    plain.save_pretrained(path, state_dict=lora.plain_weights(model))
    if lora.is_adapted(model):
        adapter_files.save_adapter(model, head_name(model), Path(path) / "adapter")
    if rates := getattr(model, "dropout_rates", None):
        config = copy.deepcopy(plain.config)
        config.update(rates)
        config.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)


def _around(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """New modules around these parameters and around the model's own where there is none of the name."""
    kept: dict[int, Any] = {id(x): x for x in [*model.parameters(), *model.buffers()]}
    named = dict(model.named_parameters())
    kept |= {id(named[name]): torch.nn.Parameter(x, requires_grad=False) for name, x in weights.items()}
    return copy.deepcopy(model, kept)


def load(cls: Any, path: str, dtype: str, *, trust_remote_code: bool) -> PreTrainedModel:
    model, info = read(cls, path, dtype, trust_remote_code=trust_remote_code)
    refuse_damaged(path, model, info, ())
    return model


def read(
    cls: Any, path: str, dtype: str = "float32", *, trust_remote_code: bool, **overrides: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """transformers loads what it can and fills the rest with noise; what it filled comes back beside the model."""
    config = read_config(path, trust_remote_code)
    rates = {name: getattr(config, name) for name in dropout_keys(config)}
    try:
        for name, value in {**dict.fromkeys(rates, 0.0), **overrides}.items():
            setattr(config, name, value)
        model, info = cls.from_pretrained(
            path,
            config=config,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:
        raise InputError(f"cannot load {path!r} as {cls.__name__}: {_first_line(error)}") from error
    remember_dropout(model, rates)
    return model, info


def read_config(path: str, trust_remote_code: bool) -> PreTrainedConfig:
    require_there(path)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise InputError(f"cannot read the config of {path!r}: {_first_line(error)}") from error


def refuse_damaged(path: str, model: PreTrainedModel, info: dict[str, Any], allowed: tuple[str, ...]) -> None:
    wild = [name for name, p in model.named_parameters() if not _finite(p)]
    mismatched = [m[0] if isinstance(m, tuple) else m for m in info["mismatched_keys"]]
    problems = {"lacks": info["missing_keys"], "has the wrong shape for": mismatched, "has NaN or infinity in": wild}
    for problem, names in problems.items():
        bad = sorted(n for n in names if n.split(".")[0] not in allowed)
        require(
            not bad,
            f"checkpoint {path!r} {problem} {len(bad)} tensors, the first is {bad[0] if bad else ''!r}: "
            "it is damaged or of another architecture; give the folder of a whole checkpoint",
        )


@torch.no_grad()
def _finite(x: Tensor) -> bool:
    """Without a tensor as large as `x`, which `isfinite` would make; a NaN is both minimum and maximum."""
    return x.numel() == 0 or bool(torch.stack(torch.aminmax(x)).isfinite().all())


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
