"""Whether who samples has the weights that are trained: the gap between its log-probs of its tokens and the trainer's.

Two programs that run one model in one precision differ by rounding: 1e-6 nats a token in float32, 1e-3 in bfloat16.
Old weights, a head that was not replaced or another temperature differ by more, or they do no harm.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastppo import distributed
from fastppo.batch import Experience, Prompts, Rollout, Sampling
from fastppo.checks import RolloutError
from fastppo.config import RolloutConfig

PROMPTS, TOKENS = 8, 16  # of a probe on purpose
CAP = 2.0  # of the importance weights that a gap between the two limits gets
LIMITS = {True: (1e-4, 1e-3), False: (1e-3, 0.05)}  # correct, stop; by whether the weights are float32
CAUSES = {
    True: "although both run one float32 module: it decodes with a cache differently from how it is trained, products "
    "are in TF32 or under autocast, or a router is near a tie",
    False: "so it samples from another distribution than the one that is trained: it has old weights or a part of "
    "them, another temperature, log-probs of unprocessed logits (--logprobs-mode), or another dtype",
}


@dataclass(frozen=True)
class Limits:
    """Mean gaps in nats per token: over which tokens are corrected, and over which a run stops."""

    correct: float
    stop: float


@dataclass(frozen=True)
class Gap:
    """|trainer's log-prob - sampler's|, nats per token, over the tokens of all ranks."""

    mean: float
    max: float

    def metrics(self, prefix: str = "rollout/logprob") -> dict[str, float]:
        return {f"{prefix}_gap_mean": self.mean, f"{prefix}_gap_max": self.max}


def measure(logprobs: Tensor, sampler_logprobs: Tensor) -> Gap:
    """Of two (R,) tensors; a collective, so every rank measures."""
    gap = (logprobs - sampler_logprobs).abs().double()
    stats = {"sum": gap.sum(), "count": gap.new_tensor(len(gap)), "max": torch.cat([gap, gap.new_zeros(1)]).max()}
    total = distributed.reduce_stats({f"gap_{name}": x for name, x in stats.items()})
    return Gap(float(total["gap_sum"] / total["gap_count"].clamp(min=1)), float(total["gap_max"]))


def limits(config: RolloutConfig, dtype: torch.dtype) -> Limits:
    """Of a run whose weights are of `dtype`."""
    correct, stop = LIMITS[dtype == torch.float32]
    return Limits(config.gap_correct or correct, config.gap_stop or stop)


def of_rollout(logprobs: Tensor | None, rollout: Rollout, version: int, limits: Limits) -> Gap | None:
    """The gap of all tokens, where the trainer's (R,) log-probs under policy `version` were computed.

    None where they were not: the first minibatch of the update then measures it.

    Raises:
        RolloutError: that very policy was sampled, and the mean gap is over the limit.
    """
    if logprobs is None or rollout.logprobs is None or logprobs is rollout.logprobs:
        return None
    gap = measure(logprobs, rollout.logprobs)
    if rollout.policy_version == version:
        require_close(gap, limits.stop, exact=rollout.exact)
    return gap


def limit_of_update(experience: Experience, version: int, limits: Limits) -> float | None:
    """What the first minibatch may find; None: there is nothing to compare, or `of_rollout` has done it."""
    rollout = experience.rollout
    if rollout.logprobs is None or "rollout/logprob_gap_mean" in experience.metrics:
        return None
    return limits.stop if rollout.policy_version == experience.policy_version == version else math.inf


def cap_for(gap: Gap | None, rollout: Rollout, version: int, limits: Limits) -> float | None:
    """The cap of the importance weights that a gap asks for; None: it is rounding, or not the sampler's doing."""
    ours = gap is not None and not rollout.exact and rollout.policy_version == version
    return CAP if ours and gap is not None and gap.mean > limits.correct else None


def importance_weights(logprobs: Tensor | None, rollout: Rollout, cap: float) -> Tensor:
    """(R,) min(policy / sampler, cap)."""
    assert logprobs is not None and rollout.logprobs is not None
    return (logprobs - rollout.logprobs).clamp(-20, 20).exp().clamp(max=cap)


def few(prompts: Prompts, sampling: Sampling, *, seed: int) -> tuple[Prompts, Sampling]:
    """Enough for a look: the first prompts, one short response to each."""
    longest = min(sampling.max_new_tokens, TOKENS)
    own = tuple(min(limit, longest) for limit in prompts.limits[:PROMPTS])
    once = replace(sampling, samples_per_prompt=1, max_new_tokens=longest, seed=seed)
    return Prompts(token_ids=prompts.token_ids[:PROMPTS], limits=own), once


def require_close(gap: Gap, limit: float, *, exact: bool) -> None:
    """
    Raises:
        RolloutError: the mean gap is over `limit`, or not a number.
    """
    if not gap.mean <= limit:
        raise RolloutError(
            f"the sampler's log-probs are {gap.mean:.3g} nats a token off the trainer's (largest gap {gap.max:.3g}), "
            f"{CAUSES[exact]} (legal: {limit:.3g}). Nothing was updated; rollout.gap_stop is the limit, and "
            "rollout.old_logprobs = 'recompute' with ppo.importance_cap corrects what is below it"
        )
