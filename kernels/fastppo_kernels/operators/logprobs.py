"""Log-probs and entropies, from logits and from hidden states. Both backwards make the logits' softmax again."""

from typing import Any

import torch
from torch import Tensor

from fastppo_kernels import backend as backends
from fastppo_kernels.head import ChunkedHead, exact_products
from fastppo_kernels.operators.common import given, like_or_empty, side_by_side
from fastppo_kernels.reference import working_dtype
from fastppo_kernels.settings import HeadSettings


@torch.library.custom_op("fastppo::token_logprobs", mutates_args=())
def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    entropy: bool,
    chunk_size: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(log-probs (R,), entropies (R,) or (0,)); keeps nothing for the backward but its inputs."""
    module, head = backends.load(backend), HeadSettings(temperature=temperature, softcap=softcap)
    chunked = ChunkedHead(hidden, weight, bias, chunk_size=chunk_size, backend=backend)
    logprobs, entropies = _empty_rows(hidden, entropy)
    with exact_products(hidden):
        for rows in chunked.chunks():
            made, made_entropy = module.logprob_rows(chunked.logits(rows), targets[rows], head, entropy=entropy)
            logprobs[rows] = made
            if made_entropy is not None:
                entropies[rows] = made_entropy
    return logprobs, entropies


@torch.library.custom_op("fastppo::token_logprobs_backward", mutates_args=())
def _token_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    dlogprobs: Tensor,
    dentropies: Tensor | None,
    temperature: float,
    softcap: float | None,
    chunk_size: int | None,
    backend: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, empty where not wanted."""
    module, head = backends.load(backend), HeadSettings(temperature=temperature, softcap=softcap)
    chunked = ChunkedHead(
        hidden, weight, bias, chunk_size=chunk_size, backend=backend, wanted=(wanted[0], wanted[1], wanted[2])
    )
    dlogprobs = dlogprobs.contiguous()
    dentropies = None if dentropies is None else dentropies.contiguous()
    with exact_products(hidden):
        for rows in chunked.chunks():
            logits = chunked.logits(rows)
            dlogits = chunked.dlogits(logits)
            dentropy = None if dentropies is None else dentropies[rows]
            module.logprob_rows_backward(logits, targets[rows], dlogprobs[rows], dentropy, head, dlogits=dlogits)
            chunked.accumulate(rows)
            del logits, dlogits  # their memory is the next chunk's
    return chunked.gradients(hidden, weight, bias)


@torch.library.custom_op("fastppo::logits_token_logprobs", mutates_args=())
def logits_token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float, softcap: float | None, entropy: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """(log-probs (R,), entropies (R,) or (0,))."""
    head = HeadSettings(temperature=temperature, softcap=softcap)
    made, entropies = backends.load(backend).logprob_rows(side_by_side(logits), targets, head, entropy=entropy)
    return made, _empty_rows(logits, False)[1] if entropies is None else entropies


@torch.library.custom_op("fastppo::logits_token_logprobs_backward", mutates_args=())
def _logits_token_logprobs_backward(
    logits: Tensor,
    targets: Tensor,
    dlogprobs: Tensor,
    dentropies: Tensor | None,
    temperature: float,
    softcap: float | None,
    backend: str,
) -> Tensor:
    head, module = HeadSettings(temperature=temperature, softcap=softcap), backends.load(backend)
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    dentropies = None if dentropies is None else dentropies.contiguous()
    module.logprob_rows_backward(
        side_by_side(logits), targets, dlogprobs.contiguous(), dentropies, head, dlogits=dlogits
    )
    return dlogits


def _empty_rows(x: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
    """Memory for (R,) log-probs and for as many entropies, or none, of the rows of `x`."""
    logprobs = torch.empty(x.shape[0], dtype=working_dtype(x), device=x.device)
    return logprobs, torch.empty(x.shape[0] if entropy else 0, dtype=logprobs.dtype, device=x.device)


@token_logprobs.register_fake
def _(hidden, weight, bias, targets, temperature, softcap, entropy, chunk_size, backend):
    return _empty_rows(hidden, entropy)


@_token_logprobs_backward.register_fake
def _(hidden, weight, bias, targets, dlogprobs, dentropies, temperature, softcap, chunk_size, backend, wanted):
    return like_or_empty((hidden, weight, bias), wanted)


@logits_token_logprobs.register_fake
def _(logits, targets, temperature, softcap, entropy, backend):
    return _empty_rows(logits, entropy)


@_logits_token_logprobs_backward.register_fake
def _(logits, targets, dlogprobs, dentropies, temperature, softcap, backend):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _keep_head(ctx: Any, inputs: Any, output: Any) -> None:
    hidden, weight, bias, targets, *settings = inputs
    ctx.save_for_backward(hidden, weight, bias, targets)
    ctx.settings = settings
    ctx.set_materialize_grads(False)


def _head_backward(ctx: Any, dlogprobs: Tensor | None, dentropies: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, targets = ctx.saved_tensors
    temperature, softcap, entropy, chunk_size, backend = ctx.settings
    if dlogprobs is None:  # only the entropy was used
        dlogprobs = torch.zeros(hidden.shape[0], dtype=working_dtype(hidden), device=hidden.device)
    dentropies = dentropies if entropy else None
    wanted = list(ctx.needs_input_grad[:3])
    made = _token_logprobs_backward(
        hidden, weight, bias, targets, dlogprobs, dentropies, temperature, softcap, chunk_size, backend, wanted
    )
    return *given(made, wanted), *[None] * 6


def _keep_logits(ctx: Any, inputs: Any, output: Any) -> None:
    logits, targets, *settings = inputs
    ctx.save_for_backward(logits, targets)
    ctx.settings = settings
    ctx.set_materialize_grads(False)


def _logits_backward(ctx: Any, dlogprobs: Tensor | None, dentropies: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, targets = ctx.saved_tensors
    temperature, softcap, entropy, backend = ctx.settings
    if dlogprobs is None:
        dlogprobs = torch.zeros(logits.shape[0], dtype=working_dtype(logits), device=logits.device)
    dentropies = dentropies if entropy else None
    dlogits = _logits_token_logprobs_backward(logits, targets, dlogprobs, dentropies, temperature, softcap, backend)
    return dlogits, *[None] * 5


token_logprobs.register_autograd(_head_backward, setup_context=_keep_head)
logits_token_logprobs.register_autograd(_logits_backward, setup_context=_keep_logits)
