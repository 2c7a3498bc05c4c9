"""Sampling by inverse CDF: one uniform number per row, so a draw is exactly repeatable.

token = the first column whose cumulative probability exceeds u * total
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastppo_kernels import checks
from fastppo_kernels.reference import nucleus, working_dtype

CDF_BLOCK = 128  # columns; about the square root of V, which both levels of the search then scan


def sample(
    logits: Tensor,
    uniform: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One token per row from softmax(logits / temperature), optionally truncated; no gradient.

    Args:
        logits: (R, V) float. Columns at -inf are never drawn.
        uniform: (R,) float in [0, 1).
        temperature: > 0.
        top_k: keep the k most probable tokens; 0 keeps all, 1 is greedy.
        top_p: then keep the fewest most probable tokens whose mass reaches top_p; in (0, 1], 1 keeps all.

    Returns:
        tokens: (R,) int64; never one of probability 0.
        logprobs: (R,) float32 (float64 for float64 logits), in nats, under the distribution the token was drawn from:
            at the temperature, truncated and renormalised. With truncation they therefore differ from
            `token_logprobs(temperature=...)`, and a ratio of the two is not 1 before the first update.

    Raises:
        ValueError: shapes or dtypes do not fit together, or a setting lies outside its range.
    """
    checks.check_logits(logits)
    checks.check_rows(logits.shape[0], uniform=uniform)
    if not temperature > 0.0:
        raise ValueError(f"temperature must be > 0, got {temperature}; for greedy decoding pass top_k=1")
    if top_k < 0 or not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_k must be >= 0 and top_p in (0, 1], got {top_k} and {top_p}; 0 and 1 keep every token")
    with torch.no_grad():
        return _sample(logits, uniform, temperature, top_k, top_p)


def _sample(logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    z, columns = logits.to(working_dtype(logits)), None
    z = z if temperature == 1.0 else z / temperature
    if 0 < top_k < z.shape[1]:
        columns = z.topk(top_k, dim=1, sorted=False).indices.sort(dim=1).values
        z = z.gather(1, columns)
    p = nucleus(torch.softmax(z, dim=1), top_p)
    index = inverse_cdf(p, uniform)[:, None]
    tokens = index if columns is None else columns.gather(1, index)
    return tokens.squeeze(1), p.gather(1, index).squeeze(1).log()


def inverse_cdf(p: Tensor, uniform: Tensor) -> Tensor:
    """(R,) int64: the first column whose cumulative mass exceeds uniform * total; its mass is never 0.

    Two levels, so that the rows of p (R, V) are read once: choose a block by the sums of blocks, then a column in it.
    """
    num_rows, num_columns = p.shape
    whole = num_columns // CDF_BLOCK * CDF_BLOCK
    mass = p[:, :whole].unflatten(1, (-1, CDF_BLOCK)).sum(2) if whole else p.new_empty(num_rows, 0)
    if whole < num_columns:
        mass = torch.cat([mass, p[:, whole:].sum(1, keepdim=True)], dim=1)
    end = mass.double().cumsum(1)
    threshold = uniform.double() * end[:, -1]
    block = _first_above(mass, end, threshold)
    remaining = threshold - F.pad(end, (1, 0)).gather(1, block[:, None]).squeeze(1)
    columns = block[:, None] * CDF_BLOCK + torch.arange(CDF_BLOCK, device=p.device)
    mass = torch.where(columns < num_columns, p.gather(1, columns.clamp(max=num_columns - 1)), 0)
    return block * CDF_BLOCK + _first_above(mass, mass.double().cumsum(1), remaining)


def _first_above(mass: Tensor, cumulative: Tensor, threshold: Tensor) -> Tensor:
    """First column whose cumulative mass exceeds the threshold, else (rounding) the last one that has mass."""
    first = (cumulative <= threshold[:, None]).sum(1)
    last = torch.where(mass > 0, torch.arange(mass.shape[1], device=mass.device), 0).amax(1)
    return torch.minimum(first, last)
