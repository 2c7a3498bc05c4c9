"""The critic's losses: (loss (), value table (R, 8), gradients ...)."""

from typing import Any

import torch
from torch import Tensor

from fastppo_kernels import backend as backends
from fastppo_kernels.operators.common import given, like_or_empty, no_autocast
from fastppo_kernels.reference import working_dtype
from fastppo_kernels.table import VALUE_COLUMNS

LOSS, DVALUE = VALUE_COLUMNS.index("loss"), VALUE_COLUMNS.index("dvalue")


@torch.library.custom_op("fastppo::value", mutates_args=())
def value(
    values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip: float | None, backend: str
) -> tuple[Tensor, Tensor]:
    """(loss, table) from values (R,)."""
    vectors = (_vector(x, working_dtype(values)) for x in (values, old_values, returns, weights))
    return _with_loss(backends.load(backend).value_rows(*vectors, clip))


@torch.library.custom_op("fastppo::linear_value", mutates_args=())
def linear_value(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    old_values: Tensor,
    returns: Tensor,
    weights: Tensor,
    clip: float | None,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, table, gradients of hidden, weight and bias) from hidden states (R, H)."""
    x = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    dhidden, dweight, dbias = like_or_empty((hidden, weight, bias), wanted)
    target = None
    if any(wanted):
        target = dhidden if wanted[0] else torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    vectors = (_vector(x, working_dtype(hidden)) for x in (old_values, returns, weights))
    with no_autocast(hidden):
        table, made = backends.load(backend).linear_value_rows(x, weight, bias, *vectors, clip, dhidden=target)
    if wanted[1]:
        dweight.copy_(made)
    if wanted[2]:
        dbias.copy_(table[:, DVALUE].sum().expand(dbias.shape))
    return *_with_loss(table), dhidden, dweight, dbias


def _vector(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.detach().to(dtype).contiguous()


def _with_loss(table: Tensor) -> tuple[Tensor, Tensor]:
    return table[:, LOSS].double().sum().to(table.dtype), table


def _fake_table(x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = working_dtype(x)
    table = torch.empty(x.shape[0], len(VALUE_COLUMNS), dtype=dtype, device=x.device)
    return torch.empty((), dtype=dtype, device=x.device), table


@value.register_fake
def _(values, *rest):
    return _fake_table(values)


@linear_value.register_fake
def _(hidden, weight, bias, *rest):
    return *_fake_table(hidden), *like_or_empty((hidden, weight, bias), rest[-2])


def _keep_table(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype


def _value_backward(ctx: Any, dloss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    (table,) = ctx.saved_tensors
    return (table[:, DVALUE] * dloss).to(ctx.dtype), *[None] * 5


def _keep_gradients(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*output[2:])


def _linear_backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    scaled = [x * dloss.to(x.dtype) for x in ctx.saved_tensors]
    return *given(scaled, ctx.needs_input_grad[:3]), *[None] * 6


value.register_autograd(_value_backward, setup_context=_keep_table)
linear_value.register_autograd(_linear_backward, setup_context=_keep_gradients)
