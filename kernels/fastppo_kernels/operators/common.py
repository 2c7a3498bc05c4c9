"""What several operators share."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def no_autocast(x: Tensor) -> Any:
    """A context in which autocast does not reach the products: the ops choose their own precision."""
    return torch.autocast(x.device.type, enabled=False)


def side_by_side(x: Tensor) -> Tensor:
    """(R, V) with the columns of a row next to each other in memory, copied if they are not."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def like_or_empty(inputs: Sequence[Tensor | None], wanted: Sequence[bool]) -> tuple[Any, ...]:
    """Memory for the gradient of each input, of its shape and dtype; of no element where it is not wanted."""
    device = next(x for x in inputs if x is not None).device
    return tuple(
        torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if x is not None and need
        else torch.empty(0, device=device)
        for x, need in zip(inputs, wanted, strict=True)
    )


def given(gradients: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradients that were wanted, None for the others."""
    return tuple(x if need else None for x, need in zip(gradients, wanted, strict=True))
