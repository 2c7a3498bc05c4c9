"""From scores to advantages: score shaping, per-token rewards, GAE and the critic-free estimators, KL controllers."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastppo import distributed
from fastppo.aggregate import sequence_index, sequence_sums
from fastppo.batch import cumulative
from fastppo.checks import require
from fastppo.config_ppo import AdvantageEstimator, PPOConfig
from fastppo_kernels import gae, token_rewards, whiten

WHITEN_EPS = 1e-8  # that of fastppo_kernels.whiten


@dataclass
class RunningMoments:
    """Mean and variance of everything seen so far (Chan et al. 1979), over all ranks."""

    count: float = 0.0
    mean: float = 0.0
    sum_sq: float = 0.0

    def update(self, x: Tensor) -> None:
        """Merge a batch in."""
        n = float(distributed.sum_over_ranks(x.new_tensor(float(x.numel()), dtype=torch.float64)))
        if n == 0:
            return
        mean = float(distributed.sum_over_ranks(x.double().sum())) / n
        sum_sq = float(distributed.sum_over_ranks((x.double() - mean).square().sum()))
        delta, total = mean - self.mean, self.count + n
        self.sum_sq += sum_sq + delta**2 * self.count * n / total
        self.mean += delta * n / total
        self.count = total

    @property
    def std(self) -> float:
        """Biased standard deviation; 1 before two different values were seen."""
        return (self.sum_sq / self.count) ** 0.5 if self.sum_sq > 0 else 1.0


@dataclass
class KLController:
    """The coefficient of the KL to the reference: fixed, or steered to a target (arXiv:1909.08593, section 2.2)."""

    coef: float
    target: float | None = None
    horizon: int = 10000

    def update(self, kl: float, num_sequences: int) -> None:
        """
        Args:
            kl: mean of the last rollout, nats per response.
            num_sequences: responses it was taken over.
        """
        if self.target is not None:
            error = max(-0.2, min(0.2, kl / self.target - 1)) if math.isfinite(kl) else 0.0
            self.coef *= 1 + error * num_sequences / self.horizon


@dataclass
class PenaltyController:
    """Coefficient of KL(old || new) in the kl-penalty objective (Schulman et al. 2017, section 4)."""

    coef: float
    target: float

    def update(self, kl: float) -> None:
        """`kl`: mean per token of the last minibatch, before its own step, nats."""
        if kl > 1.5 * self.target:
            self.coef *= 2
        elif kl < self.target / 1.5:
            self.coef /= 2


def shape_scores(
    scores: Tensor, token_scores: Tensor | None, truncated: Tensor, cu_seqlens: Tensor,
    config: PPOConfig, moments: RunningMoments,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Normalise, clip and, for cut responses, replace scores: (B,) per response, (R,) per action where given.

    The penalty replaces all scores (N+ "EOS trick"): a cut response earns exactly `missing_eos_score`.
    """
    require(
        token_scores is None or not (config.normalize_scores or config.clip_scores),
        "ppo.normalize_scores and ppo.clip_scores work on one score per response, but a reward gave scores per token",
    )
    if config.normalize_scores:
        moments.update(scores)
        scores = (scores - moments.mean) / (moments.std + 1e-8)
    if config.clip_scores is not None:
        scores = scores.clamp(-config.clip_scores, config.clip_scores)
    if config.truncation == "penalty":
        scores = torch.where(truncated, config.missing_eos_score, scores)
        if token_scores is not None:
            token_scores = torch.where(truncated[sequence_index(cu_seqlens)], 0.0, token_scores)
    return scores, token_scores


def shape_rewards(
    scores: Tensor, token_scores: Tensor | None, logprobs: Tensor | None, ref_logprobs: Tensor | None,
    cu_seqlens: Tensor, kl_coef: float, mask: Tensor, config: PPOConfig,
) -> Tensor:  # fmt: skip
    """Reward of every action, (R,): the score on the last one, token scores, and -kl_coef * KL if in the reward.

    `mask`: (R,) bool, actions that train; whitening takes mean and deviation over them alone.
    """
    counts = cu_seqlens.diff()
    nothing = torch.zeros(int(cu_seqlens[-1]), device=scores.device)
    live = counts > 0  # an empty response has no action to reward
    scores, cu_seqlens = scores[live], cumulative(counts[live]).to(scores.device)
    in_reward = config.kl_in == "reward" and logprobs is not None and ref_logprobs is not None
    rewards = token_rewards(
        scores,
        logprobs if in_reward and logprobs is not None else nothing,
        ref_logprobs if in_reward else nothing,
        cu_seqlens,
        kl_coef=kl_coef if in_reward else 0.0,
        kl_estimator=config.kl_estimator if in_reward else "k1",
    )
    rewards = rewards if token_scores is None else rewards + token_scores
    return _whitened(rewards, mask) if config.whiten_rewards else rewards


def _whitened(rewards: Tensor, mask: Tensor) -> Tensor:
    """Divided by the deviation of what trains, whose mean is kept; what does not train is scaled alike."""
    moments = RunningMoments()
    moments.update(rewards[mask])
    scale = (moments.sum_sq / max(moments.count, 1.0) + WHITEN_EPS) ** -0.5
    return ((rewards.double() - moments.mean) * scale + moments.mean).float()


def estimate(
    rewards: Tensor, values: Tensor | None, last_values: Tensor | None, cu_seqlens: Tensor,
    group_ids: Tensor, truncated: Tensor, mask: Tensor, config: PPOConfig,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Advantages (R,), and returns (R,) when there is a critic. Returns use the advantages before whitening."""
    if config.advantage == "gae":
        require(
            values is not None and last_values is not None, "advantage 'gae' needs values: give the engine a critic"
        )
        assert values is not None and last_values is not None
        bootstrap = torch.where(truncated, last_values, 0.0) if config.truncation == "bootstrap" else None
        advantages, returns = gae(
            rewards, values, cu_seqlens, gamma=config.gamma, lam=config.lam, bootstrap_values=bootstrap
        )
    else:
        advantages, returns = ESTIMATORS[config.advantage](rewards, cu_seqlens, group_ids, config.gamma), None
    whitened = config.whiten_advantages and config.advantage in ("gae", "reinforce++")
    return whiten(advantages, mask, group=distributed.group()) if whitened else advantages, returns


def _group_moments(returns: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Group place (B,), and count, sum and squared deviation of each group."""
    _, group = group_ids.unique(return_inverse=True)
    zeros = returns.new_zeros(int(group.max()) + 1)
    count = zeros.index_add(0, group, torch.ones_like(returns))
    require(
        bool((count > 1).all()),
        "group advantages compare samples of one prompt, but a prompt has one sample; draw >= 2",
    )
    total = zeros.index_add(0, group, returns)
    deviation = zeros.index_add(0, group, (returns - (total / count)[group]).square())
    return group, count, total, deviation


def _grpo(rewards: Tensor, cu_seqlens: Tensor, group_ids: Tensor, gamma: float) -> Tensor:
    """(R_i - mean) / (std + 1e-6) over the samples of a prompt, std with n - 1 (arXiv:2402.03300)."""
    returns = sequence_sums(rewards, cu_seqlens)
    group, count, total, deviation = _group_moments(returns, group_ids)
    std = (deviation / (count - 1)).sqrt()
    return ((returns - (total / count)[group]) / (std[group] + 1e-6))[sequence_index(cu_seqlens)]


def _dr_grpo(rewards: Tensor, cu_seqlens: Tensor, group_ids: Tensor, gamma: float) -> Tensor:
    """R_i - mean over the samples of a prompt (arXiv:2503.20783)."""
    returns = sequence_sums(rewards, cu_seqlens)
    group, count, total, _ = _group_moments(returns, group_ids)
    return (returns - (total / count)[group])[sequence_index(cu_seqlens)]


def _rloo(rewards: Tensor, cu_seqlens: Tensor, group_ids: Tensor, gamma: float) -> Tensor:
    """R_i - mean of the other samples of the prompt (arXiv:2402.14740)."""
    returns = sequence_sums(rewards, cu_seqlens)
    group, count, total, _ = _group_moments(returns, group_ids)
    return (returns - (total[group] - returns) / (count[group] - 1))[sequence_index(cu_seqlens)]


def _reinforce_plus_plus(rewards: Tensor, cu_seqlens: Tensor, group_ids: Tensor, gamma: float) -> Tensor:
    """Discounted reward to go of every action, whitened over the batch by the caller (arXiv:2501.03262)."""
    advantages, _ = gae(rewards, torch.zeros_like(rewards), cu_seqlens, gamma=gamma, lam=1.0)
    return advantages


ESTIMATORS: dict[AdvantageEstimator, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "grpo": _grpo,
    "dr_grpo": _dr_grpo,
    "rloo": _rloo,
    "reinforce++": _reinforce_plus_plus,
}
