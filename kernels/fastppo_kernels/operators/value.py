"""The critic's losses: (loss (), value table (R, 8), its sums (3, 8), gradients ...); `value` returns no table."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastppo_kernels import backend as backends
from fastppo_kernels.head import exact_products
from fastppo_kernels.operators.common import fake_gradient, fake_table, like_or_empty, vector
from fastppo_kernels.operators.scale import differentiated_once, keep_gradients, scaled
from fastppo_kernels.reference import working_dtype
from fastppo_kernels.table import VALUE_COLUMNS, with_sums

DVALUE = VALUE_COLUMNS.index("dvalue")
SCRATCH_ROWS = 4096  # of hidden states whose gradient nobody wants


@torch.library.custom_op("fastppo::value", mutates_args=())
def value(
    values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip: float | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, d loss / d values (R,), sums of the table) from values (R,)."""
    vectors = (vector(x, working_dtype(values)) for x in (values, old_values, returns, weights))
    module = backends.load(backend)
    loss, table, sums = with_sums(module.value_rows(*vectors, clip), module)
    return loss, table[:, DVALUE].clone(), sums


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
    vectors = [vector(x, working_dtype(hidden)) for x in (old_values, returns, weights)]
    with exact_products(hidden):
        if any(wanted) and not wanted[0]:
            table, made = _head_only(backends.load(backend), x, weight, bias, vectors, clip)
        else:
            target = dhidden if wanted[0] else None
            table, made = backends.load(backend).linear_value_rows(x, weight, bias, *vectors, clip, dhidden=target)
    if wanted[1]:
        dweight.copy_(made)
    loss, table, sums = with_sums(table, backends.load(backend))
    if wanted[2]:
        dbias.copy_(sums[0, DVALUE].expand(dbias.shape))
    return loss, table, sums, dhidden, dweight, dbias


def _head_only(
    module: ModuleType, x: Tensor, weight: Tensor, bias: Tensor | None, vectors: list[Tensor], clip: float | None
) -> tuple[Tensor, Tensor]:
    """(table, gradient of weight): the gradient of x, which a backend makes along with it, is written to a scratch."""
    scratch, parts = torch.empty_like(x[:SCRATCH_ROWS]), []
    for start in range(0, max(x.shape[0], 1), SCRATCH_ROWS):
        rows = [v[start : start + SCRATCH_ROWS] for v in (x, *vectors)]
        target = scratch[: len(rows[0])]
        parts.append(module.linear_value_rows(rows[0], weight, bias, *rows[1:], clip, dhidden=target))
    tables, gradients = zip(*parts, strict=True)
    return torch.cat(tables), torch.stack(gradients).sum(0)


@value.register_fake
def _(values, old_values, returns, weights, clip, backend):
    return fake_gradient(values, VALUE_COLUMNS)


@linear_value.register_fake
def _(hidden, weight, bias, old_values, returns, weights, clip, wanted, backend):
    return *fake_table(hidden, VALUE_COLUMNS), *like_or_empty((hidden, weight, bias), wanted)


def _keep_gradient(ctx: Any, inputs: Any, output: Any) -> None:
    keep_gradients(ctx, output[1])
    ctx.dtype = inputs[0].dtype


def _value_backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 6
    differentiated_once(dloss)
    (made,) = ctx.saved_tensors
    return (made * dloss).to(ctx.dtype), *[None] * 5


def _keep_gradients(ctx: Any, inputs: Any, output: Any) -> None:
    keep_gradients(ctx, *output[3:])


def _linear_backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    return *scaled(ctx.saved_tensors, dloss, ctx.needs_input_grad[:3]), *[None] * 6


value.register_autograd(_value_backward, setup_context=_keep_gradient)
linear_value.register_autograd(_linear_backward, setup_context=_keep_gradients)
