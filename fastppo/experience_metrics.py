"""What is logged of a rollout and its scores, over all ranks."""

import torch
from torch import Tensor

from fastppo import distributed
from fastppo.aggregate import sequence_sums
from fastppo.batch import Experience
from fastppo.rewards import Scores


def experience_metrics(experience: Experience, scores: Scores, shaped: Tensor) -> dict[str, float]:
    """What the rollout of all ranks looks like. Sums per response, means over responses; names as TRL's."""
    rollout, cu_seqlens = experience.rollout, experience.action_cu_seqlens
    means = {  # vectors, averaged over what all ranks hold
        "objective/scores": scores.totals(rollout),
        "objective/scores_shaped": shaped,
        "objective/rlhf_reward": sequence_sums(experience.rewards, cu_seqlens),
        "rollout/response_tokens": cu_seqlens.diff(),
        "rollout/truncated_frac": rollout.truncated,
    }
    means |= {f"reward/{name}": part for name, part in scores.parts.items()}
    means |= _products(scores.totals(rollout), cu_seqlens.diff())
    logprobs = experience.logprobs if experience.logprobs is not None else rollout.logprobs
    if logprobs is not None:
        means["objective/entropy"] = -sequence_sums(logprobs, cu_seqlens)
    if logprobs is not None and experience.ref_logprobs is not None:
        means["objective/kl"] = sequence_sums(logprobs - experience.ref_logprobs, cu_seqlens)
    if experience.is_weights is not None:
        means["rollout/importance_weight_mean"] = experience.is_weights
    metrics = _global_means(means)
    if rollout.policy_version is not None:
        metrics["rollout/staleness"] = float(experience.policy_version - rollout.policy_version)
    metrics["objective/score_length_correlation"] = _correlation(*(metrics.pop(name) for name in PRODUCTS))
    if experience.values is not None and experience.returns is not None:
        metrics["val/explained_variance"] = _explained_variance(experience.values, experience.returns)
        metrics |= _global_means({"val/values": experience.values})
    totals = torch.stack([experience.mask.sum(), (~rollout.truncated).sum()])
    names = ("rollout/trained_tokens", "val/num_eos_tokens")
    for name, count in sorted(scores.counts.items()):
        metrics[name] = float(distributed.sum_over_ranks(torch.tensor(count)))
    return metrics | dict(zip(names, map(float, distributed.sum_over_ranks(totals).tolist()), strict=True))


PRODUCTS = ("x", "y", "xx", "yy", "xy")


def _products(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    x, y = x.double(), y.double()
    return dict(zip(PRODUCTS, (x, y, x * x, y * y, x * y), strict=True))


def _correlation(x: float, y: float, xx: float, yy: float, xy: float) -> float:
    """Pearson's, from the means of products; 0 where one of the two does not vary."""
    variances = (xx - x * x) * (yy - y * y)
    return (xy - x * y) / variances**0.5 if variances > 1e-12 * max(xx * yy, 1e-30) else 0.0


def _explained_variance(values: Tensor, returns: Tensor) -> float:
    residual = (returns - values).double()
    moments = {"r": residual, "rr": residual.square(), "R": returns.double(), "RR": returns.double().square()}
    mean = _global_means(moments)
    return 1 - (mean["rr"] - mean["r"] ** 2) / max(mean["RR"] - mean["R"] ** 2, 1e-12)


def _global_means(vectors: dict[str, Tensor]) -> dict[str, float]:
    """Mean of each vector over the entries of all ranks; 0 where there are none."""
    doubles = [x.double() for x in vectors.values()]
    sums = torch.stack([torch.stack([x.sum(), torch.ones_like(x).sum()]) for x in doubles])
    total, count = distributed.sum_over_ranks(sums).unbind(1)
    return dict(zip(vectors, (total / count.clamp(min=1)).tolist(), strict=True))
