"""Every op in plain PyTorch, any float dtype: the specification the fast paths are tested against.

float64 inputs give float64 results, the truth; float32, bfloat16 and float16 inputs are worked on in float32.
The maths of one token of PPO is written once, in `ppo_token_terms`, and every loss op calls it.

Letters: B sequences, N packed tokens, R weighted rows, V vocabulary, H hidden.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastppo_kernels import stats
from fastppo_kernels.layout import action_layout
from fastppo_kernels.settings import HeadSettings, PPOSettings

EXPONENT_LIMIT = 20.0  # |log ratio| beyond which exp() is not followed; e^20 = 4.9e8
WHITEN_EPS = 1e-8


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden @ weight.T + bias in the working dtype; autocast does not reach it."""
    dtype = working_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        out = hidden.to(dtype) @ weight.to(dtype).T
        return out if bias is None else out + bias.to(dtype)


def logits_token_logprobs(
    logits: Tensor, targets: Tensor, head: HeadSettings, *, entropy: bool = True
) -> tuple[Tensor, Tensor | None]:
    """(log-prob of the target, entropy or None), (R,) each. See `fastppo_kernels.logits_token_logprobs`."""
    z = logits.to(working_dtype(logits))
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    log_p = torch.log_softmax(z / head.temperature, dim=-1)
    picked = log_p.gather(-1, targets[:, None]).squeeze(-1)
    if not entropy:
        return picked, None
    finite = torch.where(log_p > -torch.inf, log_p, 0)  # 0 log 0 = 0, in the gradient too
    return picked, -(log_p.exp() * finite).sum(-1)


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    head: HeadSettings,
    *,
    bias: Tensor | None = None,
    entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """(log-prob of the target, entropy or None), (R,) each. See `fastppo_kernels.token_logprobs`."""
    return logits_token_logprobs(linear(hidden, weight, bias), targets, head, entropy=entropy)


class PPORows(NamedTuple):
    """Constants of the objective, one number per row, (R,) each."""

    old_logprobs: Tensor | None
    advantages: Tensor
    weights: Tensor
    ref_logprobs: Tensor | None = None
    is_weights: Tensor | None = None
    sampler_logprobs: Tensor | None = None

    def take(self, index: Any) -> "PPORows":
        """The rows that `index` (a slice or an index tensor) picks."""
        return PPORows(*(None if x is None else x[index] for x in self))

    def cleaned(self, live: Tensor, dtype: torch.dtype) -> "PPORows":
        """Detached, in `dtype`, and 0 where a row has no weight, whatever stood there."""
        return PPORows(*(None if x is None else torch.where(live, x.detach().to(dtype), 0) for x in self))


class PPOTerms(NamedTuple):
    """Per-row parts of the objective, (R,) each; loss = sum of weights * (policy + kl + old_kl - entropy bonus)."""

    policy: Tensor
    kl: Tensor
    old_kl: Tensor
    log_ratio: Tensor
    k3: Tensor
    ratio: Tensor
    clipped: Tensor
    dual_clipped: Tensor


def k3(log_ratio: Tensor) -> Tensor:
    """exp(x) - 1 - x: the k3 estimator (joschu.net/blog/kl-approx.html), with a bounded exponential.

    Beyond EXPONENT_LIMIT the exponential keeps the value and the slope it has at the limit. Clamping it instead would
    leave the slope of -x alone, which drives a policy that is far away still further.
    """
    bounded = log_ratio - (log_ratio - log_ratio.clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT)).detach()
    return torch.expm1(bounded) - log_ratio


def kl_estimates(logprobs: Tensor, ref_logprobs: Tensor) -> dict[str, Tensor]:
    """Per-token estimates of KL(policy || reference) from a sample of the policy, by name.

    d = logprobs - ref_logprobs; k1 = d; k2 = d^2 / 2; k3 = exp(-d) - 1 + d. Differentiated as a loss, only k2 has the
    gradient of KL(policy || reference) (arXiv:2512.21852), which a trailing "+" lends to the value of another one.
    """
    d = logprobs - ref_logprobs
    return {"k1": d, "k2": 0.5 * d.square(), "k3": k3(-d)}


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """The estimate of one name in KL_ESTIMATORS, (R,)."""
    estimates = kl_estimates(logprobs, ref_logprobs)
    value = estimates[estimator.removesuffix("+")]
    return estimates["k2"] - estimates["k2"].detach() + value.detach() if estimator.endswith("+") else value


def ppo_token_terms(logprobs: Tensor, rows: PPORows, settings: PPOSettings) -> PPOTerms:
    """The PPO objective of each token: the one place where it is written.

    r      = exp(logprobs - old_logprobs), the exponent clamped to +-20
    policy = is_weight * max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))        (arXiv:1707.06347, eq. 7)
             and, for A < 0, at most is_weight * -dual_clip * A                    (arXiv:1912.09729, eq. 5)
    kl     = kl_coef * estimate of KL(policy || reference)
    old_kl = old_kl_coef * (r - 1 - log r), unbiased for KL(old || policy)         (arXiv:1707.06347, eq. 8)
    """
    old = logprobs.detach() if rows.old_logprobs is None else rows.old_logprobs
    log_ratio = logprobs - old
    ratio = log_ratio.clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT).exp()
    unclipped = -rows.advantages * ratio
    pessimistic = -rows.advantages * ratio.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    clipped = pessimistic > unclipped
    policy = torch.where(clipped, pessimistic, unclipped)
    dual_clipped = torch.zeros_like(clipped)
    if settings.dual_clip is not None:
        bound = -settings.dual_clip * rows.advantages
        dual_clipped = (rows.advantages < 0) & (policy > bound)
        policy = torch.where(dual_clipped, bound, policy)
    if rows.is_weights is not None:
        policy = rows.is_weights * policy
    kl, old_kl, old_k3 = torch.zeros_like(policy), torch.zeros_like(policy), k3(log_ratio)
    if settings.kl_coef and rows.ref_logprobs is not None:
        kl = settings.kl_coef * kl_estimate(logprobs, rows.ref_logprobs, settings.kl_estimator)
    if settings.old_kl_coef:
        old_kl = settings.old_kl_coef * old_k3
    return PPOTerms(policy, kl, old_kl, log_ratio, old_k3, ratio, clipped, dual_clipped)


def ppo_objective(
    logprobs: Tensor, entropy: Tensor | None, rows: PPORows, settings: PPOSettings
) -> tuple[Tensor, PPOTerms]:
    """(loss (), per-row terms) of rows that are already cleaned."""
    terms = ppo_token_terms(logprobs, rows, settings)
    per_row = terms.policy + terms.kl + terms.old_kl
    if entropy is not None and settings.entropy_coef:
        per_row = per_row - settings.entropy_coef * entropy
    return (rows.weights * per_row).sum(), terms


def ppo_loss(
    logprobs: Tensor, rows: PPORows, settings: PPOSettings, entropy: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss (), stats). See `fastppo_kernels.ppo_loss`."""
    live, dtype = rows.weights != 0, working_dtype(logprobs)
    rows = rows.cleaned(live, dtype)
    logprobs = torch.where(live, logprobs.to(dtype), 0)
    entropy = None if entropy is None else torch.where(live, entropy.to(dtype), 0)
    loss, terms = ppo_objective(logprobs, entropy, rows, settings)
    with torch.no_grad():
        ref_kl = {} if rows.ref_logprobs is None else kl_estimates(logprobs, rows.ref_logprobs)
        return loss, stats.ppo_stats(logprobs, entropy, rows, terms, live, ref_kl)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss (), stats). See `fastppo_kernels.value_loss`."""
    live, dtype = weights != 0, working_dtype(values)
    old, target, w = (torch.where(live, x.detach().to(dtype), 0) for x in (old_values, returns, weights))
    v = torch.where(live, values.to(dtype), 0)
    square = (v - target).square()
    clipped = torch.zeros_like(live)
    worst = square
    if clip is not None:
        clipped_square = (clipped_values(v, old, clip) - target).square()
        clipped = clipped_square > square
        worst = torch.where(clipped, clipped_square, square)
    loss = (w * 0.5 * worst).sum()
    with torch.no_grad():
        return loss, stats.value_stats(v, target, 0.5 * w * worst, square, clipped, live)


def clipped_values(values: Tensor, old_values: Tensor, clip: float) -> Tensor:
    """Values at most `clip` from their old ones; one that is free stays itself, which old + (v - old) rounds."""
    moved = values - old_values
    return torch.where(moved.abs() <= clip, values, old_values + moved.detach().clamp(-clip, clip))


def value_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, live: Tensor) -> Tensor:
    """(R,) values hidden @ weight + bias of the live rows, 0 elsewhere."""
    dtype = working_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        values = torch.where(live[:, None], hidden, 0).to(dtype) @ weight.to(dtype)
    return values if bias is None else values + bias.to(dtype).reshape(())


def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float,
    lam: float,
    mask: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) as a segmented scan of affine maps. See `fastppo_kernels.gae`.

    A_t = delta_t + gamma * lam * A_next(t) is the map A -> a A + b with a = gamma * lam (0 at the last action) and
    b = delta_t; a token that is no action is the identity. Maps compose associatively, so log2(N) doublings suffice.
    """
    dtype, num_tokens = working_dtype(rewards, values), rewards.shape[0]
    layout = action_layout(cu_seqlens, mask, num_tokens)
    if cu_seqlens.shape[0] == 1:  # no sequence, no action
        return torch.zeros_like(rewards, dtype=dtype), torch.zeros_like(values, dtype=dtype)
    r, v = (torch.where(layout.is_action, x.to(dtype), 0) for x in (rewards, values))
    after = torch.zeros_like(v) if bootstrap_values is None else bootstrap_values.to(dtype)[layout.sequence]
    next_value = torch.where(layout.is_last, after, v[layout.next_action])
    b = torch.where(layout.is_action, r + gamma * next_value - v, 0)
    a = torch.where(layout.is_action, torch.where(layout.is_last, 0.0, gamma * lam), 1.0).to(dtype)
    shift = 1
    while shift < num_tokens:
        later_a, later_b = F.pad(a[shift:], (0, shift)), F.pad(b[shift:], (0, shift))
        b = b + torch.where(a != 0, a * later_b, 0)  # where: a NaN of the next sequence stays there
        a = a * later_a
        shift *= 2
    advantages = torch.where(layout.is_action, b, 0)
    return advantages, torch.where(layout.is_action, advantages + v, 0)


def token_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    cu_seqlens: Tensor,
    *,
    kl_coef: float,
    kl_estimator: str,
    mask: Tensor | None = None,
) -> Tensor:
    """(N,) rewards; scores (B,) or (N,). See `fastppo_kernels.token_rewards`."""
    dtype, num_tokens = working_dtype(scores, logprobs), logprobs.shape[0]
    layout = action_layout(cu_seqlens, mask, num_tokens)
    rewards = scores.to(dtype)
    if scores.shape[0] != num_tokens:
        rewards = torch.where(layout.is_last, rewards[layout.sequence], 0)
    if kl_coef and ref_logprobs is not None:
        rewards = rewards - kl_coef * kl_estimate(logprobs.to(dtype), ref_logprobs.to(dtype), kl_estimator)
    return torch.where(layout.is_action, rewards, 0)


def whiten(values: Tensor, mask: Tensor | None = None, *, shift_mean: bool = True) -> Tensor:
    """(values - mean) / std over the masked values of this process. See `fastppo_kernels.whiten`."""
    live = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    chosen = values[live].to(working_dtype(values))
    mean = chosen.mean()
    centred = chosen - mean
    whitened = centred * torch.rsqrt(centred.square().mean() + WHITEN_EPS)
    out = torch.zeros_like(values, dtype=whitened.dtype)
    out[live] = whitened if shift_mean else whitened + mean
    return out


def sample(logits: Tensor, uniform: Tensor, *, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """(tokens, log-probs), (R,) each: the first token whose cumulative mass exceeds u. See `fastppo_kernels.sample`."""
    z = logits.to(working_dtype(logits)) / temperature
    if 0 < top_k < z.shape[1]:
        columns = z.topk(top_k, dim=1).indices
        z = torch.full_like(z, -torch.inf).scatter(1, columns, z.gather(1, columns))
    p = nucleus(torch.softmax(z, dim=1), top_p)
    cdf = p.cumsum(1)
    last = (p > 0).long().mul(torch.arange(z.shape[1], device=z.device)).amax(1)  # rounding can leave u above the total
    tokens = torch.searchsorted(cdf, uniform.to(cdf.dtype)[:, None] * cdf[:, -1:], right=True).squeeze(1)
    tokens = torch.minimum(tokens, last)
    return tokens, p.gather(1, tokens[:, None]).squeeze(1).log()


def nucleus(p: Tensor, top_p: float) -> Tensor:
    """The fewest most probable columns whose mass reaches top_p, renormalised; 0 elsewhere (arXiv:1904.09751)."""
    if top_p >= 1.0:
        return p
    ranked, order = p.sort(dim=1, descending=True, stable=True)
    mass_before = ranked.cumsum(1) - ranked
    kept = torch.zeros_like(p).scatter(1, order, torch.where(mass_before < top_p, ranked, 0))
    return kept / kept.sum(1, keepdim=True)
