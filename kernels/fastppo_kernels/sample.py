"""Sampling by inverse CDF: one uniform number per row, so a draw is exactly repeatable.

token = the first column whose cumulative probability exceeds u * total
"""

from typing import Literal, overload

from torch import Tensor

from fastppo_kernels import checks, operators
from fastppo_kernels.backend import choose_backend


@overload
def sample(
    logits: Tensor,
    uniform: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    return_mass: Literal[False] = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def sample(
    logits: Tensor,
    uniform: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    return_mass: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]: ...
def sample(
    logits: Tensor,
    uniform: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    return_mass: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """One token per row from softmax(logits / temperature), optionally truncated; no gradient.

    Args:
        logits: (R, V) float. Columns at -inf are never drawn.
        uniform: (R,) float in [0, 1).
        temperature: > 0.
        top_k: keep the k most probable tokens; 0 keeps all, 1 is greedy.
        top_p: then keep the fewest most probable tokens whose mass reaches top_p; in (0, 1], 1 keeps all.
        return_mass: also return the log of the probability that the truncation kept.
        backend: "triton", "native" or "reference"; None lets `choose_backend` decide.

    Returns:
        tokens: (R,) int64; never one of probability 0.
        logprobs: (R,) float32 (float64 for float64 logits), in nats, under the distribution the token was drawn from:
            at the temperature, truncated and renormalised. With truncation they therefore differ from
            `token_logprobs(temperature=...)`, and a ratio of the two is not 1 before the first update.
        log_mass: (R,), only if asked for; logprobs + log_mass is what `token_logprobs` gives. 0 without truncation.

    Raises:
        ValueError: shapes or dtypes do not fit together, or a setting lies outside its range.
    """
    checks.check_logits(logits)
    checks.check_rows(logits.shape[0], uniform=uniform)
    checks.check_device(logits=logits, uniform=uniform)
    if not temperature > 0.0:
        raise ValueError(f"temperature must be > 0, got {temperature}; for greedy decoding pass top_k=1")
    if top_k < 0 or not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_k must be >= 0 and top_p in (0, 1], got {top_k} and {top_p}; 0 and 1 keep every token")
    name = choose_backend("sample", backend, logits)
    tokens, logprobs, log_mass = operators.sample(logits.detach(), uniform, temperature, top_k, top_p, name)
    return (tokens, logprobs, log_mass) if return_mass else (tokens, logprobs)
