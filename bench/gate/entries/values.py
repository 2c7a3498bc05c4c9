"""The critic's loss, from values and from hidden states."""

from functools import partial

import torch

from fastppo_kernels import gpu
from gate.entry import Budget, Entry


def values() -> None:
    x = torch.ones(8)
    gpu.value_rows(x, x, x, x, 0.2)


def linear(width: int, dtype: torch.dtype, *, gradient: bool = True) -> None:
    """The value head of a model `width` wide."""
    hidden, weight, x = torch.ones(8, width, dtype=dtype), torch.ones(width, dtype=dtype), torch.ones(8)
    dhidden = torch.empty_like(hidden) if gradient else None
    gpu.linear_value_rows(hidden, weight, weight[:1], x, x, x, 0.2, dhidden=dhidden)


ROWS = Budget(registers=128, narrow=27)  # the numbers of a row and its line of the table, beside H wide loads
WIDTHS = (896, 4096, 8192, 16384)
ENTRIES = [
    Entry(name="value", call=values, budget=Budget(registers=64)),
    *(Entry(name=f"linear value H={n}", call=partial(linear, n, torch.bfloat16), budget=ROWS) for n in WIDTHS),
    Entry(name="linear value H=4096 fp32", call=partial(linear, 4096, torch.float32), budget=ROWS),
    Entry(name="linear value H=4096 forward", call=partial(linear, 4096, torch.bfloat16, gradient=False), budget=ROWS),
]
