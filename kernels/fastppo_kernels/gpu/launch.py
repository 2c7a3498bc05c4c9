"""What the launchers of every kernel share: where a kernel may run."""

from typing import Any

import torch
from torch import Tensor
from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret)  # read when the kernels are defined, which is when it counts


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
