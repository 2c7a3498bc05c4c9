"""The clipped PPO objective from log-probs, from logits, or from hidden states and the LM head.

    loss = sum_i weights_i * (policy_i + kl_coef * KL_i + old_kl_coef * (r_i - 1 - log r_i) - entropy_coef * H_i)

`reference.ppo_token_terms` defines the per-token terms; each backend has them once more, in one function. The weights
hold the normalisation (one over the tokens of the whole minibatch, or any other aggregation), so how rows are split
into micro-batches cannot change the objective.
"""

from typing import Any, Unpack

import torch
from torch import Tensor

from fastppo_kernels import checks, operators, parallel
from fastppo_kernels.backend import choose_backend
from fastppo_kernels.reference import PPORows
from fastppo_kernels.settings import HeadSettings, PPOOptions, PPOSettings
from fastppo_kernels.stats import Stats
from fastppo_kernels.table import ppo_stats


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    *,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    is_weights: Tensor | None = None,
    backend: str | None = None,
    **options: Unpack[PPOOptions],
) -> tuple[Tensor, Stats]:
    """The PPO loss of R tokens and its statistics; differentiable in logprobs and entropy, all else is constant.

    Args:
        logprobs: (R,) float, log-prob of each token under the policy being trained, in nats.
        old_logprobs: (R,) float, under the policy that PPO clips against. None means the policy being trained itself:
            the ratio is exactly 1 and its gradient that of the log-prob.
        advantages: (R,) float.
        weights: (R,) float. A row of weight 0 contributes nothing, not even a NaN.
        ref_logprobs: (R,) float, under the reference policy; needed if kl_coef > 0, else only for the statistics.
        entropy: (R,) float, in nats; needed if entropy_coef != 0.
        is_weights: (R,) float, multiplies the surrogate only, e.g. the truncated importance weight between the
            sampler's and the old policy. Constant.
        backend: "triton", "native" or "reference"; None lets `choose_backend` decide.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high], both 0.2; math.inf: no clip there.
        dual_clip: c > 1 bounds the loss of a negative advantage at -c * advantage (arXiv:1912.09729); None: no bound.
        kl_coef: weight, 0 unless given, of the penalty on KL(policy || reference) estimated by `kl_estimator`.
        kl_estimator: k1, k2, k3 (default), or k1+ and k3+ (that value with the gradient of k2). As a loss only k2 and
            the "+" forms have the gradient of KL(policy || reference).
        entropy_coef: weight of the entropy bonus, 0 unless given.
        old_kl_coef: weight, 0 unless given, of r - 1 - log r, unbiased for KL(old || policy) (arXiv:1707.06347, eq. 8).

    Returns:
        loss: () float32, float64 for float64 logprobs.
        stats: 0-d float64 tensors over the rows with a weight, additive (see `merge_stats`):
            token_count, policy_loss_sum and kl_loss_sum (weighted, with their coefficients), clip_count (rows whose
            clipped branch is strictly larger) = clip_low_count + clip_high_count, dual_clip_count, ratio_sum,
            ratio_sq_sum, ratio_max, old_k1_sum, old_k2_sum, old_k3_sum (of KL(old || policy)), logprob_sum,
            entropy_sum if the entropy is known, ref_k1_sum, ref_k2_sum, ref_k3_sum if ref_logprobs is given.

    Raises:
        ValueError: shapes or dtypes do not fit together, a setting lies outside its range, or a term lacks its input.
    """
    settings = PPOSettings(**options)
    checks.check_rows(logprobs.shape[0] if logprobs.ndim else -1, logprobs=logprobs, entropy=entropy)
    rows = PPORows(old_logprobs, advantages, weights, ref_logprobs, is_weights)
    _check_rows(rows, logprobs.shape[0], settings)
    checks.check_device(logprobs=logprobs, entropy=entropy, **rows._asdict())
    if settings.entropy_coef and entropy is None:
        raise ValueError(
            f"entropy_coef = {settings.entropy_coef} needs entropy; take it from token_logprobs(return_entropy=True)"
        )
    name = choose_backend("ppo_loss", backend, logprobs)
    loss, _, sums = operators.ppo_tokens(logprobs, entropy, *rows[:5], settings.encoded(), name)
    return loss, _stats(sums, rows, entropy is not None)


def logits_ppo_loss(
    logits: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ref_logprobs: Tensor | None = None,
    is_weights: Tensor | None = None,
    with_entropy: bool = False,
    inplace: bool = True,
    backend: str | None = None,
    **options: Unpack[PPOOptions],
) -> tuple[Tensor, Stats]:
    """`ppo_loss` from logits: differentiable in the logits, their gradient made along with the loss.

    Args:
        logits: (R, V) float, before temperature and soft-cap. Columns at -inf are outside the vocabulary.
        targets: (R,) int64 in [0, V); anything where the weight is 0.
        temperature, softcap: as in `token_logprobs`.
        with_entropy: put entropy_sum into the statistics though entropy_coef is 0.
        inplace: when a gradient is wanted, write it over the logits, whose values are gone after this call; backward
            can then run once. Without a gradient the logits are not touched.
        All others: as in `ppo_loss`.

    Returns:
        (loss, stats) as in `ppo_loss`. The gradient has the dtype of the logits.

    Raises:
        ValueError: as in `ppo_loss`; a gradient of float16 logits is wanted, which would be rounded before a loss scale
            reaches it; or `inplace` on a leaf that requires grad or a view of one, not this op's to overwrite.
    """
    settings = PPOSettings(**options)
    checks.check_logits(logits)
    checks.check_targets(targets, logits.shape[0])
    rows = PPORows(old_logprobs, advantages, weights, ref_logprobs, is_weights)
    _check_rows(rows, logits.shape[0], settings)
    checks.check_device(logits=logits, targets=targets, **rows._asdict())
    checks.check_gradient_dtype(logits=logits)
    grad = torch.is_grad_enabled() and logits.requires_grad
    if inplace and grad and _owned_by_a_leaf(logits):
        raise ValueError(
            "logits is a leaf that requires grad, or a view of one, got inplace=True; "
            "pass inplace=False to keep its values"
        )
    HeadSettings(temperature=temperature, softcap=softcap)
    name = choose_backend("logits_ppo_loss", backend, logits)
    entropy = with_entropy or settings.entropy_coef != 0.0
    arguments = (targets, *rows[:5], temperature, softcap, settings.encoded(), entropy)
    if inplace and grad:
        loss, sums = _InplacePPO.apply(logits, *arguments, name)
    else:
        loss, _, sums, _ = operators.logits_ppo(logits, *arguments, grad, name)
    return loss, _stats(sums, rows, entropy)


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ref_logprobs: Tensor | None = None,
    is_weights: Tensor | None = None,
    with_entropy: bool = False,
    sampler_logprobs: Tensor | None = None,
    chunk_size: int | None = None,
    group: Any = None,
    backend: str | None = None,
    **options: Unpack[PPOOptions],
) -> tuple[Tensor, Stats]:
    """`ppo_loss` from hidden states and the LM head: differentiable in hidden, weight and bias.

    The gradient is made along with the loss, one chunk of logits at a time; without a gradient only the loss is made.
    Memory beyond the gradients is one chunk of logits. Gradients are accumulated in float32 and returned in the dtype
    of their input: until the end that of a bfloat16 weight takes 4 bytes an element, on the CPU that of `hidden` too.
    There rows of weight 0 never enter a product; a GPU is not asked how many there are, and they cost what the others
    cost: leave them out.

    Args:
        hidden, weight, targets, bias, temperature, softcap, chunk_size: as in `token_logprobs`. Targets of rows of
            weight 0 may be anything.
        with_entropy: put entropy_sum into the statistics though entropy_coef is 0.
        sampler_logprobs: (R,) of whoever drew the targets; adds gap_sum and gap_max, |log-prob - sampler_logprobs|, to
            the statistics and changes nothing else.
        group: as in `token_logprobs`; every rank passes the same rows and gets the same loss.
        All others: as in `ppo_loss`.

    Returns:
        (loss, stats) as in `ppo_loss`.

    Raises:
        ValueError: as in `ppo_loss` and `token_logprobs`, or a gradient of a float16 tensor is wanted.
    """
    settings = PPOSettings(**options)
    checks.check_head(hidden, weight, bias, chunk_size)
    checks.check_targets(targets, hidden.shape[0])
    rows = PPORows(old_logprobs, advantages, weights, ref_logprobs, is_weights, sampler_logprobs)
    _check_rows(rows, hidden.shape[0], settings)
    checks.check_device(hidden=hidden, weight=weight, bias=bias, targets=targets, **rows._asdict())
    checks.check_gradient_dtype(hidden=hidden, weight=weight, bias=bias)
    head = HeadSettings(temperature=temperature, softcap=softcap)
    name = choose_backend("linear_ppo_loss", backend, hidden)
    entropy = with_entropy or settings.entropy_coef != 0.0
    if group is not None:
        split = (settings, head, entropy, chunk_size, name, group)
        loss, sums = parallel.LinearPPO.apply(hidden, weight, bias, targets, rows, *split)
        return loss, _stats(sums, rows, entropy)
    options_of_head = (temperature, softcap, settings.encoded(), entropy, chunk_size)
    loss, _, sums, *_ = operators.linear_ppo(
        hidden, weight, bias, targets, *rows, *options_of_head, _wanted(hidden, weight, bias), name
    )
    return loss, _stats(sums, rows, entropy)


class _InplacePPO(torch.autograd.Function):
    """`logits_ppo_`, whose gradient lies where the logits were."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        dlogits = logits.detach()
        loss, _, sums = operators.logits_ppo_(dlogits, *arguments)
        ctx.save_for_backward(dlogits)
        ctx.num_arguments, ctx.spent = len(arguments), False
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError(
                "logits_ppo_loss(inplace=True) can be differentiated once: its gradient was scaled where it lay. "
                "Pass inplace=False to call backward again."
            )
        ctx.spent = True
        (dlogits,) = ctx.saved_tensors
        operators.scale_(dlogits, grads[0])
        return dlogits, *[None] * ctx.num_arguments


def _owned_by_a_leaf(x: Tensor) -> bool:
    """Whether the memory of `x`, which requires grad, is a leaf's: its own or that it is a view of."""
    return x.is_leaf or (x._base is not None and x._base.is_leaf)


def _check_rows(rows: PPORows, num_rows: int, settings: PPOSettings) -> None:
    checks.check_rows(num_rows, **rows._asdict())
    if settings.kl_coef and rows.ref_logprobs is None:
        raise ValueError(f"kl_coef = {settings.kl_coef} needs ref_logprobs, got None; pass them or set kl_coef = 0")


def _wanted(*inputs: Tensor | None) -> list[bool]:
    """Which inputs autograd wants a gradient of."""
    return [x is not None and x.requires_grad and torch.is_grad_enabled() for x in inputs]


def _stats(sums: Tensor, rows: PPORows, entropy: bool) -> Stats:
    has = {"reference": rows.ref_logprobs is not None, "sampler": rows.sampler_logprobs is not None}
    return ppo_stats(sums.detach(), entropy=entropy, **has)
