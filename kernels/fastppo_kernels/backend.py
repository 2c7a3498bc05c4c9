"""Which implementation of an op runs: one rule, visible here, with no fallback."""

import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

BACKEND_VARIABLE = "FASTPPO_BACKEND"
MODULES = {"triton": "fastppo_kernels.gpu", "native": "fastppo_kernels.native", "reference": "fastppo_kernels.eager"}


def available(x: Tensor) -> tuple[str, ...]:
    """Backends that work on tensors like `x`, the one that runs by default first."""
    half_or_single = x.dtype in (torch.float32, torch.bfloat16)
    if x.device.type == "cuda" and (half_or_single or x.dtype == torch.float16):  # CUDA and ROCm
        return "triton", "reference"
    if x.device.type == "cpu" and half_or_single:
        interpreted = ("triton",) if os.environ.get("TRITON_INTERPRET") == "1" else ()
        return "native", "reference", *interpreted
    return ("reference",)  # float64, the truth; float16 on the CPU; other devices


def choose_backend(op: str, backend: str | None, x: Tensor) -> str:
    """Name of the implementation that runs: the argument, else the environment variable, else the first available.

    Args:
        op: name of the op, for the error message.
        backend: what the caller asked for; None leaves the choice to FASTPPO_BACKEND and then to the rule.
        x: the op's main tensor: its logits, hidden states, log-probs, values or rewards.

    Returns:
        "triton" (GPU), "native" (C++, CPU) or "reference" (PyTorch, any device and dtype).

    Raises:
        ValueError: the name asked for does not exist for this op on these tensors.
    """
    names = available(x)
    chosen = backend if backend is not None else os.environ.get(BACKEND_VARIABLE) or names[0]
    if chosen not in names:
        source = "backend" if backend is not None else BACKEND_VARIABLE
        raise ValueError(
            f"{source} = {chosen!r} does not exist for {op} on {x.device.type} {x.dtype} tensors; "
            f"available: {', '.join(names)}. Leave it unset to let fastppo_kernels choose."
        )
    return chosen


def load(name: str) -> ModuleType:
    """The module of a backend; each has the functions that `fastppo_kernels.eager` defines."""
    return importlib.import_module(MODULES[name])
