"""Log-probability (and entropy) of given tokens, with gradient, and with no (R, V) tensor when made from hidden states.

log p_y = z_y - logsumexp_v z_v,   z = softcap * tanh(logits / softcap) / temperature
"""

from typing import Any, Literal, overload

from torch import Tensor

from fastppo_kernels import checks, operators, parallel
from fastppo_kernels.backend import choose_backend
from fastppo_kernels.settings import HeadSettings


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
    group: Any = None,
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
    group: Any = None,
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
    group: Any = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target token under the LM head, chunk by chunk.

    Differentiable in hidden, weight and bias. Inputs that need no gradient cause no work in the backward, and without
    gradients nothing is kept. Memory beyond the results is one chunk of logits. Arithmetic is float32 (float64 for
    float64 hidden) whatever the inputs' dtype and whatever autocast says; products of float32 tensors on a GPU follow
    `torch.set_float32_matmul_precision`. The gradient of `weight` is accumulated in that dtype and returned in the
    weight's own. The bits of a row depend on neither the other rows nor how many there are.

    Args:
        hidden: (R, H) float, the inputs of the LM head at the positions that predict the targets.
        weight: (V, H) float, the LM head.
        targets: (R,) int64 in [0, V).
        bias: (V,) float or None.
        temperature: divides the logits; > 0. The sampler's own, or ratios are off before the first update.
        softcap: cap of cap * tanh(logits / cap), applied before the temperature; None for none.
        return_entropy: also return the entropy of each row's distribution, in nats.
        chunk_size: rows per chunk, at most; None takes the default for V and the device.
        group: torch.distributed process group over whose ranks the vocabulary is split: `weight` and `bias` are the
            equal share of this rank, in rank order, all else is the same on every rank. None: not split.
        backend: "triton", "native" or "reference"; None lets `choose_backend` decide.

    Returns:
        (R,) float32 log-probabilities in nats, or (log-probabilities, entropies). float64 for float64 hidden.

    Raises:
        ValueError: shapes or dtypes do not fit together, or a setting lies outside its range.
    """
    checks.check_head(hidden, weight, bias, chunk_size)
    checks.check_targets(targets, hidden.shape[0])
    checks.check_device(hidden=hidden, weight=weight, bias=bias, targets=targets)
    head = HeadSettings(temperature=temperature, softcap=softcap)
    name = choose_backend("token_logprobs", backend, hidden)
    if group is not None:
        split = (head, return_entropy, chunk_size, name, group)
        logprobs, entropy = parallel.TokenLogprobs.apply(hidden, weight, bias, targets, *split)
        return (logprobs, entropy) if return_entropy else logprobs
    logprobs, entropy = operators.token_logprobs(
        hidden, weight, bias, targets, temperature, softcap, return_entropy, chunk_size, name
    )
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
    return_entropy: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
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
    checks.check_device(logits=logits, targets=targets)
    HeadSettings(temperature=temperature, softcap=softcap)
    name = choose_backend("logits_token_logprobs", backend, logits)
    logprobs, entropy = operators.logits_token_logprobs(logits, targets, temperature, softcap, return_entropy, name)
    return (logprobs, entropy) if return_entropy else logprobs
