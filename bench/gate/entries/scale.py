"""A gradient times grad_output."""

from functools import partial

import torch

from fastppo_kernels import gpu
from gate.entry import Budget, Entry


def scale(dtype: torch.dtype) -> None:
    gpu.scale_(torch.ones(8, 128256, dtype=dtype), torch.ones(()))


ENTRIES = [
    Entry(name="scale bf16", call=partial(scale, torch.bfloat16), budget=Budget(registers=64)),
    Entry(name="scale fp32", call=partial(scale, torch.float32), budget=Budget(registers=64)),
]
