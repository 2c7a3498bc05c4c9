"""Ops over packed sequences; none has a gradient."""

import torch
from torch import Tensor

from fastppo_kernels import backend as backends
from fastppo_kernels.reference import working_dtype


@torch.library.custom_op("fastppo::gae", mutates_args=())
def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    gamma: float,
    lam: float,
    mask: Tensor | None,
    bootstrap_values: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), (N,) each."""
    return backends.load(backend).gae(
        rewards, values, cu_seqlens, gamma=gamma, lam=lam, mask=mask, bootstrap_values=bootstrap_values
    )


@torch.library.custom_op("fastppo::token_rewards", mutates_args=())
def token_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    cu_seqlens: Tensor,
    kl_coef: float,
    kl_estimator: str,
    mask: Tensor | None,
    backend: str,
) -> Tensor:
    """(N,) rewards."""
    if cu_seqlens.shape[0] - 1 == scores.shape[0] == logprobs.shape[0]:
        scores = _unambiguous(scores, cu_seqlens)
    return backends.load(backend).token_rewards(
        scores, logprobs, ref_logprobs, cu_seqlens, kl_coef=kl_coef, kl_estimator=kl_estimator, mask=mask
    )


@torch.library.custom_op("fastppo::moments", mutates_args=())
def moments(values: Tensor, mask: Tensor | None, backend: str) -> Tensor:
    """(3,) float64: count, mean, sum of squared deviations."""
    return backends.load(backend).moments(values, mask)


def _unambiguous(scores: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Scores of B = N sequences or tokens, the same thing if all lengths are 1; else an error, on a GPU NaN."""
    same = (cu_seqlens.diff() == 1).all()
    if scores.device.type != "cpu":
        return torch.where(same, scores, torch.nan)
    if not same:
        raise ValueError(
            f"scores of shape (B,) = (N,) = ({scores.shape[0]},) can be per sequence or per token when sequences have "
            "other lengths than 1; drop the sequences of length 0"
        )
    return scores


@gae.register_fake
def _(rewards, values, cu_seqlens, gamma, lam, mask, bootstrap_values, backend):
    out = torch.empty(rewards.shape, dtype=working_dtype(rewards, values), device=rewards.device)
    return out, torch.empty_like(out)


@token_rewards.register_fake
def _(scores, logprobs, ref_logprobs, cu_seqlens, kl_coef, kl_estimator, mask, backend):
    return torch.empty(logprobs.shape, dtype=working_dtype(scores, logprobs), device=logprobs.device)


@moments.register_fake
def _(values, mask, backend):
    return torch.empty(3, dtype=torch.float64, device=values.device)
