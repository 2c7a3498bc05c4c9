"""Whether who samples has the weights that are trained: the gap between its log-probs of its tokens and the trainer's.

Two programs that run one model in one precision differ by rounding: 1e-6 nats a token in float32, 1e-3 in bfloat16.
Old weights, a head that was not replaced or another temperature differ by more, or they do no harm. What goes wrong in
one response of many, a row of keys that is another's, hides in the mean: so the worst response has limits of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastppo import distributed
from fastppo.aggregate import sequence_sums
from fastppo.batch import Experience, Prompts, Rollout, Sampling, cumulative
from fastppo.checks import RolloutError
from fastppo.config import RolloutConfig

PROMPTS, TOKENS = 8, 16  # of a probe on purpose
SHORT = 16  # tokens: a shorter response is judged as if it had so many, as one token may round far in bfloat16
CAP = 2.0  # of the importance weights that a gap between the two limits gets
LIMITS = {True: (1e-4, 1e-3), False: (1e-3, 0.05)}  # correct, stop; by whether the weights are float32
CAUSES = {
    True: "although both run one float32 module: it decodes with a cache differently from how it is trained, products "
    "are in TF32 or under autocast, or a router is near a tie",
    False: "so it samples from another distribution than the one that is trained: it has old weights or a part of "
    "them, another temperature, log-probs of unprocessed logits (--logprobs-mode), or another dtype",
}


@dataclass(frozen=True)
class Gap:
    """|trainer's log-prob - sampler's|, nats per token, over the tokens of all ranks."""

    mean: float
    max: float
    response: float
    """The largest mean of one response."""

    def metrics(self, prefix: str = "rollout/logprob") -> dict[str, float]:
        return {f"{prefix}_gap_mean": self.mean, f"{prefix}_gap_max": self.max, f"{prefix}_gap_response": self.response}


@dataclass(frozen=True)
class Limits:
    """Mean gaps in nats per token: over which tokens are corrected, and over which a run stops."""

    correct: float
    stop: float
    response_factor: float
    """The gap of every single response may be this many times both."""

    def corrects(self, gap: Gap) -> bool:
        return self._is_over(gap, self.correct)

    def stops(self, gap: Gap) -> bool:
        """Also where the gap is not a number."""
        return self._is_over(gap, self.stop)

    def _is_over(self, gap: Gap, limit: float) -> bool:
        return not (gap.mean <= limit and gap.response <= limit * self.response_factor)


def measure(logprobs: Tensor, rollout: Rollout) -> Gap:
    """Of the trainer's (R,) log-probs; a collective, so every rank measures."""
    assert rollout.logprobs is not None
    gap, counts = (logprobs - rollout.logprobs).abs().double(), rollout.action_counts
    responses = sequence_sums(gap, cumulative(counts)) / counts.clamp(min=SHORT)
    stats = {"sum": gap.sum(), "count": gap.new_tensor(len(gap)), "max": _largest(gap)}
    stats["response_max"] = _largest(responses)
    total = distributed.reduce_stats({f"gap_{name}": x for name, x in stats.items()})
    mean = total["gap_sum"] / total["gap_count"].clamp(min=1)
    return Gap(float(mean), float(total["gap_max"]), float(total["gap_response_max"]))


def _largest(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(1)]).max()


def limits(config: RolloutConfig, dtype: torch.dtype) -> Limits:
    """Of a run whose weights are of `dtype`."""
    correct, stop = LIMITS[dtype == torch.float32]
    return Limits(config.gap_correct or correct, config.gap_stop or stop, config.gap_response_factor)


def of_rollout(logprobs: Tensor | None, rollout: Rollout, version: int, limits: Limits) -> Gap | None:
    """The gap of all tokens, where the trainer's (R,) log-probs under policy `version` were computed.

    None where they were not: the first minibatch of the update then measures it.

    Raises:
        RolloutError: that very policy was sampled, and a gap is over its limit.
    """
    if logprobs is None or rollout.logprobs is None or logprobs is rollout.logprobs:
        return None
    gap = measure(logprobs, rollout)
    if rollout.policy_version == version:
        require_close(gap, limits, exact=rollout.exact)
    return gap


def check_of_update(
    experience: Experience, version: int, limits: Limits, logprobs: Callable[[], Tensor]
) -> Callable[[float, float], None] | None:
    """What is told the mean and the largest gap of the first minibatch; None: `of_rollout` has seen all tokens.

    No response is farther off than its worst token. Only where that is over the limit of a response, or the mean over
    its own, `logprobs` makes the trainer's log-probs of the whole rollout, and their gap decides.

    Raises (what is returned):
        RolloutError: that very policy was sampled, and a gap is over its limit.
    """
    rollout = experience.rollout
    if rollout.logprobs is None or "rollout/logprob_gap_mean" in experience.metrics:
        return None

    def check(mean: float, largest: float) -> None:
        current = rollout.policy_version == experience.policy_version == version
        if current and limits.stops(Gap(mean, largest, response=largest)):
            require_close(measure(logprobs(), rollout), limits, exact=rollout.exact)

    return check


def cap_for(gap: Gap | None, rollout: Rollout, version: int, limits: Limits) -> float | None:
    """The cap of the importance weights that a gap asks for; None: it is rounding, or not the sampler's doing."""
    ours = gap is not None and not rollout.exact and rollout.policy_version == version
    return CAP if ours and gap is not None and limits.corrects(gap) else None


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


def require_close(gap: Gap, limits: Limits, *, exact: bool) -> None:
    """
    Raises:
        RolloutError: a gap is over its limit, or not a number.
    """
    if limits.stops(gap):
        legal = f"{limits.stop:.3g}, and {limits.stop * limits.response_factor:.3g} in one response"
        raise RolloutError(
            f"the sampler's log-probs are {gap.mean:.3g} nats a token off the trainer's (largest gap {gap.max:.3g}), "
            f"{gap.response:.3g} in the worst response, {CAUSES[exact]} (legal: {legal}). Nothing was updated; "
            "rollout.gap_stop is the limit, and rollout.old_logprobs = 'recompute' with ppo.importance_cap corrects "
            "what is below it"
        )
