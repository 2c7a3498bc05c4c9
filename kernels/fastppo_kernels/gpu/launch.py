"""What every launcher of a Triton kernel does first."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from triton import knobs

INTERPRETED = knobs.runtime.interpret  # of this process: kernels are compiled or interpreted when imported


def device_of(op: str, x: Tensor) -> AbstractContextManager:
    """Context in which kernels are launched on the device of `x`.

    Raises:
        ValueError: `x` is on the CPU and kernels are not interpreted.
    """
    if x.is_cuda:
        return torch.cuda.device(x.device)
    if INTERPRETED:
        return nullcontext()
    raise ValueError(
        f"the triton backend of {op} needs GPU tensors, got {x.device.type}; move them with .cuda(), or start Python "
        "with TRITON_INTERPRET=1 to run the kernels on the CPU"
    )
