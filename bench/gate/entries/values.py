"""The critic's loss, from values and from hidden states."""

from functools import partial
from typing import Any

import torch

from fastppo_kernels import gpu
from fastppo_kernels.gpu.values import linear_tile
from gate.entry import EVERYWHERE, Budget, Entry


def values() -> None:
    x = torch.ones(8)
    gpu.value_rows(x, x, x, x, 0.2)


def linear(width: int, dtype: torch.dtype, *, gradient: bool = True) -> None:
    """The value head of a model `width` wide."""
    hidden, weight, x = torch.ones(8, width, dtype=dtype), torch.ones(width, dtype=dtype), torch.ones(8)
    dhidden = torch.empty_like(hidden) if gradient else None
    gpu.linear_value_rows(hidden, weight, weight[:1], x, x, x, 0.2, dhidden=dhidden)


def entry(width: int, per_element: float, name: str = "", dtype: torch.dtype = torch.bfloat16, **options: Any) -> Entry:
    """Instructions per number of the hidden states on sm_90; beside these wide loads a row has numbers of its own."""
    tile = linear_tile(width)
    per_thread = tile.rows * tile.columns // (32 * tile.num_warps)
    return Entry(
        name=f"linear value H={width}{name}",
        call=partial(linear, width, dtype, gradient=options.pop("gradient", True)),
        budget=Budget(registers=128, narrow=27, per_element={"sm_90": per_element}),
        elements=lambda _: per_thread,
        **options,
    )


ENTRIES = [
    Entry(name="value", call=values, budget=Budget(registers=64)),
    entry(896, 18.5),
    entry(4096, 15, targets=EVERYWHERE),
    entry(8192, 15),
    entry(16384, 11),
    entry(4096, 13, " fp32", torch.float32),
    entry(4096, 15, " fp16", torch.float16, targets=("sm_90", "gfx942")),
    entry(4096, 9.5, " forward", gradient=False),
]
