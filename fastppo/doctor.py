"""`fastppo doctor`: what is installed, what runs, and why."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from fastppo import attention
from fastppo.report import table
from fastppo.rollout import vllm_command
from fastppo_kernels import native
from fastppo_kernels.backend import BACKEND_VARIABLE, available, choose_backend

PACKAGES = {
    "torch": "required",
    "triton": "required on Linux",
    "transformers": "required",
    "safetensors": "required",
    "flash-attn": "optional: packed attention in half precision on CUDA; PyTorch's varlen kernel without it",
    "peft": "optional: memory.share = 'lora'",
    "torchao": "optional: optimizer kinds 'adamw-8bit' and 'adamw-4bit'",
    "liger-kernel": "optional: layers.fused = 'liger'",
    "tensorboard": "optional: train.loggers = ['tensorboard']",
    "wandb": "optional: train.loggers = ['wandb']",
    "trackio": "optional: train.loggers = ['trackio']",
}


def doctor() -> None:
    """Print packages, devices, which implementation each operation takes here, and how a vLLM server is started."""
    table("packages", ("package", "version", "use"), [(p, _version(p), use) for p, use in PACKAGES.items()])
    table("machine", ("", ""), _machine())
    table("what runs", ("operation", "implementation", "why"), _choices())
    print("a server for rollout.engine = 'vllm' (vLLM >= 0.32, in an environment of its own; docs/rollout.md)")
    print("\n".join(vllm_command.described()))


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
    return [*rows, ("losses, log-probs, gae, sampling", *_kernels(device))]


ATTENTION_WHY = {
    "flash_attn": "half precision on CUDA and the package is installed",
    "torch_varlen": "half precision on CUDA, flash-attn is not installed",
    "native": "CPU, float32: fastppo's own, nothing padded",
    "sdpa": "none of the others can: SDPA on sequences of like length",
}


def _kernels(device: torch.device) -> tuple[str, str]:
    """The backend that a float32 tensor of this device gets, and why."""
    x = torch.empty(0, device=device)
    try:
        name = choose_backend("doctor", None, x)
        detail = f" (C++, {', '.join(native.available_isas())})" if name == "native" else ""
    except (FileNotFoundError, ValueError) as error:
        return "none", str(error)
    forced = os.environ.get(BACKEND_VARIABLE)
    return name + detail, f"{BACKEND_VARIABLE}={forced}" if forced else f"the first of: {', '.join(available(x))}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
