"""The critic's losses: (loss (), value table (R, 8), its sums (3, 8), gradients ...)."""

from typing import Any

import torch
from torch import Tensor

from fastppo_kernels import backend as backends
from fastppo_kernels.head import exact_products
from fastppo_kernels.operators.common import fake_table, like_or_empty, vector
from fastppo_kernels.operators.scale import scaled
from fastppo_kernels.reference import working_dtype
from fastppo_kernels.table import VALUE_COLUMNS, with_sums

DVALUE = VALUE_COLUMNS.index("dvalue")


@torch.library.custom_op("fastppo::value", mutates_args=())
def value(
    values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip: float | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, table, sums) from values (R,)."""
    vectors = (vector(x, working_dtype(values)) for x in (values, old_values, returns, weights))
    return with_sums(backends.load(backend).value_rows(*vectors, clip))


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, table, sums, gradients of hidden, weight and bias) from hidden states (R, H)."""
    x = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    dhidden, dweight, dbias = like_or_empty((hidden, weight, bias), wanted)
    target = None
    if any(wanted):
        target = dhidden if wanted[0] else torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    vectors = (vector(x, working_dtype(hidden)) for x in (old_values, returns, weights))
    with exact_products(hidden):
        table, made = backends.load(backend).linear_value_rows(x, weight, bias, *vectors, clip, dhidden=target)
    if wanted[1]:
        dweight.copy_(made)
    if wanted[2]:
        dbias.copy_(table[:, DVALUE].sum().expand(dbias.shape))
    return *with_sums(table), dhidden, dweight, dbias


@value.register_fake
def _(values, old_values, returns, weights, clip, backend):
    return fake_table(values, VALUE_COLUMNS)


@linear_value.register_fake
def _(hidden, weight, bias, old_values, returns, weights, clip, wanted, backend):
    return *fake_table(hidden, VALUE_COLUMNS), *like_or_empty((hidden, weight, bias), wanted)


def _keep_table(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype


def _value_backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    (table,) = ctx.saved_tensors
    return (table[:, DVALUE] * dloss).to(ctx.dtype), *[None] * 5


def _keep_gradients(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*output[3:])


def _linear_backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *scaled(ctx.saved_tensors, dloss, ctx.needs_input_grad[:3]), *[None] * 6


value.register_autograd(_value_backward, setup_context=_keep_table)
linear_value.register_autograd(_linear_backward, setup_context=_keep_gradients)
