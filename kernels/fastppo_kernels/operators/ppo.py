"""The PPO losses. The gradient is made along with the loss; backward only multiplies it by grad_output.

Each returns (loss (), PPO table (R, 16), its sums (3, 16), gradients ...); see `fastppo_kernels.table`. A gradient has
no element where it is not wanted. `ppo_tokens` returns the gradient of the log-probs in place of the table.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastppo_kernels import backend as backends
from fastppo_kernels.head import ChunkedHead, exact_products
from fastppo_kernels.operators.common import fake_gradient, fake_table, like_or_empty, ppo_rows, side_by_side, vector
from fastppo_kernels.operators.scale import differentiated_once, keep_gradients, scaled
from fastppo_kernels.reference import PPORows, working_dtype
from fastppo_kernels.settings import HeadSettings, PPOSettings
from fastppo_kernels.table import PPO_COLUMNS, with_sums

DLOGPROB = PPO_COLUMNS.index("dlogprob")


@torch.library.custom_op("fastppo::ppo_tokens", mutates_args=())
def ppo_tokens(
    logprobs: Tensor,
    entropy: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    ref_logprobs: Tensor | None,
    is_weights: Tensor | None,
    settings: list[float],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, d loss / d log-probs (R,), sums) from log-probs (R,) and, with an entropy bonus, entropies (R,)."""
    dtype = working_dtype(logprobs)
    rows = ppo_rows(dtype, old_logprobs, advantages, weights, ref_logprobs, is_weights)
    entropy = None if entropy is None else vector(entropy, dtype)
    decoded = PPOSettings.decoded(settings)
    module = backends.load(backend)
    loss, table, sums = with_sums(module.ppo_tokens(vector(logprobs, dtype), entropy, rows, decoded), module)
    return loss, table[:, DLOGPROB].clone(), sums


@torch.library.custom_op("fastppo::logits_ppo", mutates_args=())
def logits_ppo(
    logits: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    ref_logprobs: Tensor | None,
    is_weights: Tensor | None,
    temperature: float,
    softcap: float | None,
    settings: list[float],
    entropy: bool,
    grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, table, sums, dlogits) from logits (R, V), which keep their values."""
    rows = ppo_rows(working_dtype(logits), old_logprobs, advantages, weights, ref_logprobs, is_weights)
    (dlogits,) = like_or_empty((logits,), (grad,))
    table = backends.load(backend).ppo_rows(
        side_by_side(logits),
        targets,
        rows,
        PPOSettings.decoded(settings),
        HeadSettings(temperature=temperature, softcap=softcap),
        entropy=entropy,
        dlogits=dlogits if grad else None,
    )
    return *with_sums(table, backends.load(backend)), dlogits


@torch.library.custom_op("fastppo::logits_ppo_", mutates_args=("logits",))
def logits_ppo_(
    logits: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    ref_logprobs: Tensor | None,
    is_weights: Tensor | None,
    temperature: float,
    softcap: float | None,
    settings: list[float],
    entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, table, sums); the logits (R, V) become their gradient."""
    rows = ppo_rows(working_dtype(logits), old_logprobs, advantages, weights, ref_logprobs, is_weights)
    z = side_by_side(logits)
    table = backends.load(backend).ppo_rows(
        z,
        targets,
        rows,
        PPOSettings.decoded(settings),
        HeadSettings(temperature=temperature, softcap=softcap),
        entropy=entropy,
        dlogits=z,
    )
    if z is not logits:
        logits.copy_(z)
    return with_sums(table, backends.load(backend))


@torch.library.custom_op("fastppo::linear_ppo", mutates_args=())
def linear_ppo(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    ref_logprobs: Tensor | None,
    is_weights: Tensor | None,
    sampler_logprobs: Tensor | None,
    temperature: float,
    softcap: float | None,
    settings: list[float],
    entropy: bool,
    chunk_size: int | None,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, table, sums, gradients of hidden, weight and bias) from hidden states (R, H): 6 R V H operations."""
    module, head = backends.load(backend), HeadSettings(temperature=temperature, softcap=softcap)
    decoded, dtype = PPOSettings.decoded(settings), working_dtype(hidden)
    rows = ppo_rows(dtype, old_logprobs, advantages, weights, ref_logprobs, is_weights, sampler_logprobs)
    live = _live_rows(rows.weights)
    if live is None:
        x = hidden
    elif live.dtype == torch.bool:
        x = torch.where(live[:, None], hidden, 0)  # a NaN there would reach the weight's gradient as NaN * 0
    else:
        x, targets, rows = hidden[live], targets[live], rows.take(live)
    chunked = ChunkedHead(
        x, weight, bias, chunk_size=chunk_size, backend=backend, wanted=(wanted[0], wanted[1], wanted[2])
    )
    table = torch.empty(x.shape[0], len(PPO_COLUMNS), dtype=dtype, device=x.device)
    with exact_products(hidden):
        for some in chunked.chunks():
            of_chunk = (targets[some], rows.take(some), decoded, head)
            table[some] = _chunk(chunked, some, module, *of_chunk, entropy=entropy, grad=any(wanted))
    dhidden, dweight, dbias = chunked.gradients(x, weight, bias)
    if live is not None and live.dtype != torch.bool:
        table = table.new_zeros(hidden.shape[0], table.shape[1]).index_copy(0, live, table)
        dhidden = dhidden.new_zeros(hidden.shape).index_copy(0, live, dhidden) if wanted[0] else dhidden
    return *with_sums(table, module), dhidden, dweight, dbias


def _chunk(
    chunked: ChunkedHead,
    some: slice,
    module: ModuleType,
    targets: Tensor,
    rows: PPORows,
    settings: PPOSettings,
    head: HeadSettings,
    *,
    entropy: bool,
    grad: bool,
) -> Tensor:
    """The table of a chunk of rows; a function, so that its logits are gone before the next chunk makes its own."""
    logits = chunked.logits(some)
    dlogits = chunked.dlogits(logits) if grad else None
    table = module.ppo_rows(logits, targets, rows, settings, head, entropy=entropy, dlogits=dlogits)
    if dlogits is not None:
        chunked.accumulate(some)
    return table


def _live_rows(weights: Tensor) -> Tensor | None:
    """On the CPU the index of rows with a weight, None if all have one; on a GPU, which is not asked, a mask."""
    live = weights != 0
    if live.device.type != "cpu":
        return live
    return None if bool(live.all()) else live.nonzero().squeeze(1)


@ppo_tokens.register_fake
def _(logprobs, entropy, old_logprobs, advantages, weights, ref_logprobs, is_weights, settings, backend):
    return fake_gradient(logprobs, PPO_COLUMNS)


@logits_ppo.register_fake
def _(
    logits, targets, old_logprobs, advantages, weights, ref_logprobs, is_weights,
    temperature, softcap, settings, entropy, grad, backend,
):  # fmt: skip
    return *fake_table(logits, PPO_COLUMNS), *like_or_empty((logits,), (grad,))


@logits_ppo_.register_fake
def _(
    logits, targets, old_logprobs, advantages, weights, ref_logprobs, is_weights,
    temperature, softcap, settings, entropy, backend,
):  # fmt: skip
    return fake_table(logits, PPO_COLUMNS)


@linear_ppo.register_fake
def _(
    hidden, weight, bias, targets, old_logprobs, advantages, weights, ref_logprobs, is_weights, sampler_logprobs,
    temperature, softcap, settings, entropy, chunk_size, wanted, backend,
):  # fmt: skip
    return *fake_table(hidden, PPO_COLUMNS), *like_or_empty((hidden, weight, bias), wanted)


def _keep_gradients(ctx: Any, inputs: Any, output: Any) -> None:
    keep_gradients(ctx, *output[3:])
    ctx.num_inputs = len(inputs)


def _scale(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """Gradients of the first inputs; only the loss is differentiable, callers detach the rest."""
    made = ctx.saved_tensors
    return *scaled(made, dloss, ctx.needs_input_grad[: len(made)]), *[None] * (ctx.num_inputs - len(made))


def _keep_tokens(ctx: Any, inputs: Any, output: Any) -> None:
    logprobs, entropy, _, _, weights, _, _, settings, _ = inputs
    ctx.save_for_backward(output[1], None if entropy is None else weights)
    ctx.set_materialize_grads(False)  # no zeros as large as what is returned beside the loss
    ctx.dtypes = logprobs.dtype, None if entropy is None else entropy.dtype
    ctx.entropy_coef = PPOSettings.decoded(settings).entropy_coef


def _tokens_backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 9
    differentiated_once(dloss)
    made, weights = ctx.saved_tensors
    logprob_dtype, entropy_dtype = ctx.dtypes
    dentropy = None
    if entropy_dtype is not None:
        dentropy = (-ctx.entropy_coef * weights.to(made.dtype) * dloss).to(entropy_dtype)
    return (made * dloss).to(logprob_dtype), dentropy, *[None] * 7


ppo_tokens.register_autograd(_tokens_backward, setup_context=_keep_tokens)
logits_ppo.register_autograd(_scale, setup_context=_keep_gradients)
linear_ppo.register_autograd(_scale, setup_context=_keep_gradients)
