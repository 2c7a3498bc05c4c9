"""AdamW (arXiv:1711.05101) in its kinds: the moments in float32, or quantized per block by torchao."""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastppo.checks import require
from fastppo.config import OptimizerConfig

QUANTIZED = {"adamw-8bit": "8bit", "adamw-4bit": "4bit"}  # and how torchao calls them


def require_torchao(config: OptimizerConfig) -> None:
    """
    Raises:
        ValueError: the optimizer needs torchao, which is not installed.
    """
    there = config.kind not in QUANTIZED or importlib.util.find_spec("torchao") is not None
    require(there, f"the optimizer {config.kind!r} needs the package torchao: pip install 'fastppo[torchao]'")


def make_adamw(masters: Sequence[Tensor], config: OptimizerConfig) -> torch.optim.Optimizer:
    """An optimizer that steps those of `masters`, float32, that have a gradient.

    Raises:
        ValueError: it needs torchao, which is not installed.
    """
    options: dict[str, Any] = {"betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    if config.kind not in QUANTIZED:
        return torch.optim.AdamW(masters, lr=config.lr, fused=True, **options)
    require_torchao(config)
    import torchao.optim

    return getattr(torchao.optim, f"AdamW{QUANTIZED[config.kind]}")(masters, lr=config.lr, **options)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the learning rate `rate`."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao's: read by compiled code
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def plain_tensors(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """One master's optimizer state as what a file can hold: a quantized moment as its parts, `<moment>.<part>`."""
    for name, value in state.items():
        if hasattr(value, "__tensor_flatten__"):
            parts, _ = value.__tensor_flatten__()
            yield from ((f"{name}.{part}", getattr(value, part)) for part in parts)
        else:
            yield name, value


def placed(name: str, value: Tensor, device: torch.device, kind: str) -> Tensor:
    """Part `name` of a state where its optimizer has it: torchao counts steps on the CPU, whatever it steps."""
    return value.cpu() if kind in QUANTIZED and name == "step" else value.to(device)


def state_from(tensors: Mapping[str, Tensor], shape: torch.Size, kind: str) -> dict[str, Tensor]:
    """The inverse of `plain_tensors`."""
    out: dict[str, Tensor] = {}
    for name, value in tensors.items():
        moment, _, part = name.partition(".")
        if not part:
            out[moment] = value
        elif part == "codes":
            out[moment] = _quantized({p: tensors[f"{moment}.{p}"] for p in ("codes", "scale", "qmap")}, shape, kind)
    return out


def _quantized(parts: Mapping[str, Tensor], shape: torch.Size, kind: str) -> Tensor:
    from torchao.optim.subclass_4bit import OptimState4bit
    from torchao.optim.subclass_8bit import OptimState8bit

    cls = {"adamw-8bit": OptimState8bit, "adamw-4bit": OptimState4bit}[kind]
    signed = bool((parts["qmap"] < 0).any())  # the first moment is, the second is not
    block = shape.numel() // parts["scale"].numel()
    made = cls.zeros(shape, signed, block, parts["codes"].device, torch.float32)
    for name, value in parts.items():
        getattr(made, name).copy_(value)
    return made
