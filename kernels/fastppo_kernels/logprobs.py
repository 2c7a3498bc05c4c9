"""Log-probability (and entropy) of given tokens, with gradient, and with no (R, V) tensor when made from hidden states.

log p_y = z_y - logsumexp_v z_v,   z = softcap * tanh(logits / softcap) / temperature
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastppo_kernels import checks, reference
from fastppo_kernels.backend import choose_backend
from fastppo_kernels.head import ChunkedHead, dlogits_
from fastppo_kernels.settings import HeadSettings


class _TokenLogprobs(torch.autograd.Function):
    """Keeps its inputs and nothing else; the backward makes each chunk again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: HeadSettings,
        entropy: bool,
        chunk_size: int | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.head, ctx.chunk_size = head, chunk_size
        ctx.set_materialize_grads(False)
        dtype = reference.working_dtype(hidden)
        logprobs = torch.empty(hidden.shape[0], dtype=dtype, device=hidden.device)
        entropies = torch.empty_like(logprobs) if entropy else logprobs.new_empty(0)
        with torch.autocast(hidden.device.type, enabled=False):
            chunked = ChunkedHead(hidden, weight, bias, head, chunk_size=chunk_size)
            for rows in chunked.chunks():
                chunk = chunked.softmax(rows, targets, entropy=entropy)
                logprobs[rows] = chunk.logprobs
                if chunk.entropy is not None:
                    entropies[rows] = chunk.entropy
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dlogprobs, dentropy = grads
        hidden, weight, bias, targets = ctx.saved_tensors
        if dlogprobs is None:  # only the entropy was used
            dlogprobs = torch.zeros(hidden.shape[0], dtype=reference.working_dtype(hidden), device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            wanted = ctx.needs_input_grad[:3]
            chunked = ChunkedHead(hidden, weight, bias, ctx.head, chunk_size=ctx.chunk_size, wanted=wanted)
            for rows in chunked.chunks():
                chunk = chunked.softmax(rows, targets, entropy=dentropy is not None)
                de = None if dentropy is None else dentropy[rows]
                chunked.accumulate(rows, *dlogits_(chunk, targets[rows], dlogprobs[rows], de, ctx.head))
        made = (chunked.dhidden, chunked.dweight, chunked.dbias)
        cast = (None if g is None else g.to(x.dtype) for g, x in zip(made, (hidden, weight, bias), strict=True))
        return *cast, None, None, None, None


@overload
def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    return_entropy: Literal[False] = False,
    bias: Tensor | None = None,
    chunk_size: int | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor: ...
@overload
def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    return_entropy: Literal[True],
    bias: Tensor | None = None,
    chunk_size: int | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target token under the LM head, chunk by chunk.

    Differentiable in hidden, weight and bias. Inputs that need no gradient cause no work in the backward, and without
    gradients nothing is kept. Memory beyond the results is one chunk of logits. Arithmetic is float32 (float64 for
    float64 hidden) whatever the inputs' dtype and whatever autocast says; the gradient of `weight` is accumulated in
    that dtype and returned in the weight's own.

    Args:
        hidden: (R, H) float, the inputs of the LM head at the positions that predict the targets.
        weight: (V, H) float, the LM head.
        targets: (R,) int64 in [0, V).
        bias: (V,) float or None.
        temperature: divides the logits; > 0. The sampler's own, or ratios are off before the first update.
        softcap: cap of cap * tanh(logits / cap), applied before the temperature; None for none.
        return_entropy: also return the entropy of each row's distribution, in nats.
        chunk_size: rows per chunk; None takes the default for V and the device.
        backend: "reference"; None lets `choose_backend` decide.

    Returns:
        (R,) float32 log-probabilities in nats, or (log-probabilities, entropies). float64 for float64 hidden.

    Raises:
        ValueError: shapes or dtypes do not fit together, or a setting lies outside its range.
    """
    checks.check_head(hidden, weight, bias, chunk_size)
    checks.check_targets(targets, hidden.shape[0])
    head = HeadSettings(temperature=temperature, softcap=softcap)
    choose_backend("token_logprobs", backend)
    logprobs, entropy = _TokenLogprobs.apply(hidden, weight, bias, targets, head, return_entropy, chunk_size)
    return (logprobs, entropy) if return_entropy else logprobs


@overload
def logits_token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    return_entropy: Literal[False] = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor: ...
@overload
def logits_token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    return_entropy: Literal[True],
    temperature: float = 1.0,
    softcap: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def logits_token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target token from given logits; differentiable in the logits.

    Args:
        logits: (R, V) float, before temperature and soft-cap. Columns at -inf are outside the vocabulary.
        targets: (R,) int64 in [0, V).
        temperature, softcap, return_entropy, backend: as in `token_logprobs`.

    Returns:
        (R,) float32 log-probabilities in nats, or (log-probabilities, entropies). float64 for float64 logits.

    Raises:
        ValueError: shapes or dtypes do not fit together, or a setting lies outside its range.
    """
    checks.check_logits(logits)
    checks.check_targets(targets, logits.shape[0])
    head = HeadSettings(temperature=temperature, softcap=softcap)
    choose_backend("logits_token_logprobs", backend)
    logprobs, entropy = reference.logits_token_logprobs(logits, targets, head, entropy=return_entropy)
    return logprobs if entropy is None else (logprobs, entropy)
