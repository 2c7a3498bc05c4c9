"""The reference backend: the functions every backend has, in plain PyTorch, for any device and float dtype.

`fastppo_kernels.gpu` (Triton) and `fastppo_kernels.native` (C++) have the same functions with the same meaning. A row
of weight 0 is zeros in what they write, whatever its inputs hold. Letters: R rows, V vocabulary, H hidden.

    z = cap * tanh(logits / cap) / T      p = softmax(z)      H = -sum_v p_v log p_v
    dlogits_v = (c ([v = y] - p_v) - e p_v (log p_v + H)) (1 - tanh^2) / T     for d log p_y = c and dH = e
"""

import torch
from torch import Tensor

from fastppo_kernels import reference
from fastppo_kernels.reference import PPORows, gae, token_rewards, working_dtype
from fastppo_kernels.reference_attention import decode_attention
from fastppo_kernels.settings import HeadSettings, PPOSettings
from fastppo_kernels.table import PPO_COLUMNS, VALUE_COLUMNS, ppo_table, table_sums, value_table

__all__ = [
    "decode_attention",
    "gae",
    "linear_value_rows",
    "logprob_rows",
    "logprob_rows_backward",
    "moments",
    "ppo_rows",
    "ppo_tokens",
    "sample",
    "scale_",
    "table_sums",
    "token_rewards",
    "value_rows",
]


def ppo_rows(
    logits: Tensor,
    targets: Tensor,
    rows: PPORows,
    settings: PPOSettings,
    head: HeadSettings,
    *,
    entropy: bool,
    dlogits: Tensor | None,
) -> Tensor:
    """The PPO table of R rows of logits, and the gradient of the summed loss.

    Args:
        logits: (R, V), rows any stride apart. targets: (R,) int64; anything where the weight is 0.
        entropy: fill that column too; needed for an entropy bonus.
        dlogits: (R, V) of any float dtype to write to; may be `logits`, or lie over its memory row by row. None: none.

    Returns:
        (R, 16), see `fastppo_kernels.table`.
    """
    live = rows.weights != 0
    safe, targets = torch.where(live[:, None], logits, 0), torch.where(live, targets, 0)
    logprobs, entropies = logprob_rows(safe, targets, head, entropy=entropy)
    table = ppo_table(logprobs, entropies, rows, settings)
    if dlogits is not None:
        de = -settings.entropy_coef * torch.where(live, rows.weights, 0) if settings.entropy_coef else None
        logprob_rows_backward(safe, targets, table[:, PPO_COLUMNS.index("dlogprob")], de, head, dlogits=dlogits)
        dlogits.masked_fill_(~live[:, None], 0)
    return table


def logprob_rows(logits: Tensor, targets: Tensor, head: HeadSettings, *, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """(log-probs of the targets, entropies or None), (R,) each."""
    with torch.no_grad():
        return reference.logits_token_logprobs(logits, targets, head, entropy=entropy)


def logprob_rows_backward(
    logits: Tensor, targets: Tensor, dlogprobs: Tensor, dentropy: Tensor | None, head: HeadSettings, *, dlogits: Tensor
) -> None:
    """Writes the gradient for given d log-prob and d entropy, (R,) each, to `dlogits`, which may lie over `logits`."""
    z, slope = logits.to(working_dtype(logits)), 1.0 / head.temperature
    if head.softcap is not None:
        bent = torch.tanh(z / head.softcap)
        z, slope = bent * head.softcap, (1.0 - bent.square()) / head.temperature
    log_p = torch.log_softmax(z / head.temperature, dim=1)
    p = log_p.exp()
    d = -dlogprobs[:, None] * p
    if dentropy is not None:
        finite = torch.where(p > 0, log_p, 0)
        d -= dentropy[:, None] * p * (finite - torch.linalg.vecdot(p, finite)[:, None])
    d.scatter_add_(1, targets[:, None], dlogprobs[:, None].to(d.dtype))
    dlogits.copy_(d.mul_(slope))


def ppo_tokens(logprobs: Tensor, entropy: Tensor | None, rows: PPORows, settings: PPOSettings) -> Tensor:
    """The PPO table (R, 16) of given log-probs."""
    return ppo_table(logprobs, entropy, rows, settings)


def value_rows(values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip: float | None) -> Tensor:
    """The value table (R, 8)."""
    return value_table(values, old_values, returns, weights, clip)


def linear_value_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    old_values: Tensor,
    returns: Tensor,
    weights: Tensor,
    clip: float | None,
    *,
    dhidden: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The value table (R, 8) of the values hidden @ weight + bias, and the gradients.

    Args:
        hidden: (R, H). weight: (H,). bias: one number or None.
        dhidden: (R, H) to write to; None: no gradients.

    Returns:
        (table, gradient of weight (H,) in the working dtype or None); that of bias is the sum of column dvalue.
    """
    live, dtype = weights != 0, working_dtype(hidden)
    x = torch.where(live[:, None], hidden, 0).to(dtype)
    values = x @ weight.to(dtype) + (0 if bias is None else bias.to(dtype).reshape(()))
    table = value_table(values, old_values, returns, weights, clip)
    if dhidden is None:
        return table, None
    dvalues = table[:, VALUE_COLUMNS.index("dvalue")]
    dhidden.copy_(dvalues[:, None] * weight.to(dtype))
    return table, x.T @ dvalues


def moments(values: Tensor, mask: Tensor | None) -> Tensor:
    """(3,) float64: how many values the mask keeps, their mean, and the sum of their squared deviations from it."""
    live = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    x, count = torch.where(live, values.double(), 0), live.sum().double()
    mean = x.sum() / count.clamp(min=1)
    return torch.stack([count, mean, torch.where(live, x - mean, 0).square().sum()])


def scale_(x: Tensor, factor: Tensor) -> None:
    """x *= factor, a number on the CPU, rounded once; where it is 1 nothing is read or written."""
    if (number := factor.item()) != 1.0:
        x.mul_(number)


def sample(
    logits: Tensor, uniform: Tensor, *, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, log-probs, log of the kept mass), (R,) each. See `fastppo_kernels.sample`."""
    tokens, logprobs = reference.sample(logits, uniform, temperature=temperature, top_k=top_k, top_p=top_p)
    if top_p >= 1.0 and not 0 < top_k < logits.shape[1]:
        return tokens, logprobs, torch.zeros_like(logprobs)
    whole, _ = reference.logits_token_logprobs(logits, tokens, HeadSettings(temperature=temperature), entropy=False)
    return tokens, logprobs, whole - logprobs
