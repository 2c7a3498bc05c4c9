"""What the launchers of every kernel share: where a kernel may run, and the options it is compiled with."""

from typing import Any

import torch
from torch import Tensor
from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret)  # read when the kernels are defined, which is when it counts
ROW_DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of logits
NO_DUAL_CLIP = 1e30  # never reached, as the ratio is at most e^20; infinity times an advantage of 0 would be NaN


def options(threads: int, *, max_registers: int | None = None) -> dict[str, Any]:
    """Options of a launch of so many threads; the default of FP fusion differs between versions of Triton.

    `max_registers` per thread also tells NVIDIA's assembler that it may use them, where it would rather spill a few
    to fit a second program beside the first.
    """
    found = {"num_warps": max(threads // warp_size(), 1), "enable_fp_fusion": True}
    return found if max_registers is None or is_amd() else found | {"maxnreg": max_registers}


def check_device(x: Tensor) -> None:
    """Raise ValueError if `x` lies on the CPU and the kernels were not defined for Triton's interpreter."""
    if x.device.type == "cpu" and not INTERPRETED:
        raise ValueError(
            "the Triton kernels got CPU tensors: move them to a GPU, choose another backend, "
            "or set TRITON_INTERPRET=1 before the first import to run them slowly in Triton's interpreter"
        )


def on_device(x: Tensor) -> Any:
    """Context in which kernels are launched on the device of `x`."""
    return torch.cuda.device_of(x)


def vector(x: Tensor | None) -> Tensor | None:
    """`x` as contiguous float32; itself where it already is."""
    return None if x is None else x.detach().to(torch.float32).contiguous()


def is_amd() -> bool:
    """Whether this PyTorch drives AMD GPUs."""
    return torch.version.hip is not None


def warp_size() -> int:
    """Threads per warp: 64 on AMD's data centre GPUs, else 32."""
    return 64 if is_amd() else 32


def num_processors(x: Tensor) -> int:
    """Multiprocessors (compute units) of the device of `x`; 0 for the CPU."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 0


def shared_memory_bytes(x: Tensor) -> int:
    """Shared memory a program may ask for on the device of `x`; the H100's for the CPU."""
    if not x.is_cuda:
        return 232448
    return getattr(torch.cuda.get_device_properties(x.device), "shared_memory_per_block_optin", 65536)
