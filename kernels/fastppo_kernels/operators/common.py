"""What several operators share."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastppo_kernels.reference import PPORows, working_dtype


def vector(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` (R,) without its graph, in `dtype`, contiguous."""
    return x.detach().to(dtype).contiguous()


def ppo_rows(dtype: torch.dtype, *vectors: Tensor | None) -> PPORows:
    """The fields of PPORows in their order, each as `vector` makes it."""
    return PPORows(*(None if x is None else vector(x, dtype) for x in vectors))


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


def fake_gradient(x: Tensor, columns: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Fakes of (loss, gradient of the rows of `x`, sums)."""
    loss, table, sums = fake_table(x, columns)
    return loss, table[:, 0].clone(), sums


def fake_table(x: Tensor, columns: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Fakes of (loss, table, sums) of the rows of `x`."""
    like = {"dtype": working_dtype(x), "device": x.device}
    sums = torch.empty(3, len(columns), dtype=torch.float64, device=x.device)
    return torch.empty((), **like), torch.empty(x.shape[0], len(columns), **like), sums


def looked_at(*tensors: Tensor) -> bool:
    """Whether PyTorch's dispatcher has to see an op of these: it is traced, fake, profiled, or a mode counts operators.

    Otherwise a kernel is called without it: on a CPU it takes 0.1 ms for an operator that writes to its inputs, which
    is more than the attention of a small model's token.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    profiled = torch._C._autograd._profiler_enabled()  # pyright: ignore[reportAttributeAccessIssue]
    modes = torch._C._len_torch_dispatch_stack()
    return profiled or modes > 0 or not all(type(x) in (Tensor, torch.nn.Parameter) for x in tensors)
