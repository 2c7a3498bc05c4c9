"""`fastppo doctor`: what is installed, what runs, and why."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from fastppo import attention
from fastppo.report import table
from fastppo_kernels import native

PACKAGES = {
    "torch": "required",
    "triton": "required on Linux",
    "transformers": "required",
    "safetensors": "required",
    "flash-attn": "optional: packed attention in half precision on CUDA; PyTorch's varlen kernel without it",
    "tensorboard": "optional: train.loggers = ['tensorboard']",
    "wandb": "optional: train.loggers = ['wandb']",
    "trackio": "optional: train.loggers = ['trackio']",
}


def doctor() -> None:
    """Print three tables: packages, devices, and which implementation each operation takes here."""
    table("packages", ("package", "version", "use"), [(p, _version(p), use) for p, use in PACKAGES.items()])
    table("machine", ("", ""), _machine())
    table("what runs", ("operation", "implementation", "why"), _choices())


def _machine() -> list[tuple[str, str]]:
    rows = [("python", platform.python_version()), ("cpu threads", str(torch.get_num_threads()))]
    if not torch.cuda.is_available():
        return [*rows, ("cuda", "no device")]
    properties = torch.cuda.get_device_properties(0)
    return [*rows, ("cuda", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")]


def _choices() -> list[tuple[str, str, str]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    users: dict[attention.Backend, list[str]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for softcap, label in ((None, ""), (50.0, " with soft-cap")):
            users.setdefault(attention.backend(device, dtype, softcap), []).append(f"{str(dtype)[6:]}{label}")
    rows = [(f"attention, {', '.join(names)}", name, ATTENTION_WHY[name]) for name, names in users.items()]
    forced = os.environ.get("FASTPPO_BACKEND")
    why = f"FASTPPO_BACKEND={forced}" if forced else "the default"
    rows.append(("losses, log-probs, sampling", forced or "reference (PyTorch)", why))
    rows.append(("gae", _gae_backend(device, forced), why if forced else "C++ on CPU, PyTorch elsewhere"))
    return rows


ATTENTION_WHY = {
    "flash_attn": "half precision on CUDA and the package is installed",
    "torch_varlen": "half precision on CUDA, flash-attn is not installed",
    "sdpa": "CPU, float32, or a soft-cap without flash-attn: SDPA on sequences of like length",
}


def _gae_backend(device: torch.device, forced: str | None) -> str:
    if forced or device.type != "cpu":
        return forced or "reference (PyTorch)"
    try:
        return f"native (C++, ABI {native.load().fastppo_abi_version()})"
    except FileNotFoundError as error:
        return f"missing: {error}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
