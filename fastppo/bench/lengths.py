"""How long prompts and responses are: three distributions of one mean, so that they hold the same number of tokens."""

import torch
from torch import Tensor

LENGTHS = ("fixed", "uniform", "long-tailed")
LONGEST = 8  # times the mean


def lengths(kind: str, count: int, mean: int, generator: torch.Generator) -> list[int]:
    """`count` lengths >= 1 that sum to count * mean.

    fixed: all `mean`. uniform: from half of it to 1.5 times. long-tailed: lognormal with sigma = 1, where the longest
    sixteenth holds about a third of all tokens; at most `LONGEST` times the mean.
    """
    if kind == "fixed" or mean == 1:
        return [mean] * count
    if kind == "uniform":
        raw = 0.5 + torch.rand(count, generator=generator)
    else:
        raw = torch.randn(count, generator=generator).exp().clamp(max=LONGEST)
    return _scaled(raw, count * mean, LONGEST * mean)


def _scaled(raw: Tensor, total: int, longest: int) -> list[int]:
    """Whole numbers in 1 .. longest in proportion to `raw` that sum to `total`, what rounding leaves over one each."""
    out = (raw * total / raw.sum()).floor().long().clamp(1, longest)
    order = raw.argsort(descending=True).tolist()
    while (left := total - int(out.sum())) != 0:
        step = 1 if left > 0 else -1
        able = [i for i in order if 1 <= int(out[i]) + step <= longest]
        for i in able[: abs(left)]:
            out[i] += step
    return out.tolist()
