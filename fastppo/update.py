"""The PPO update: roles x epochs x minibatches x micro-batches, early stop, roll-back, non-finite steps skipped."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastppo import distributed, models
from fastppo.aggregate import loss_weights
from fastppo.batch import Experience
from fastppo.checks import RolloutError
from fastppo.config import PPOConfig
from fastppo.microbatch import MicroBatch, microbatches
from fastppo.optimizer import Trainable
from fastppo.out_of_memory import Portion
from fastppo_kernels import linear_ppo_loss, linear_value_loss, merge_stats

Stats = dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """The coefficients of one update, beside the config's constants."""

    temperature: float
    kl_coef: float
    old_kl_coef: float
    loss_divisor: float
    train_policy: bool
    on_policy: bool  # the policy is still the one whose log-probs the experience holds
    check_gap: Callable[[float, float], None] | None = None
    """Told how far the sampler's log-probs are off in the first minibatch, mean and largest; None: it is known."""


@dataclass
class Minibatch:
    """One optimizer step's worth of sequences, with the weight of each action."""

    sequences: list[int]
    weights: Tensor  # (R,), shared by the minibatches of an epoch: each action is in one of them
    trains: bool  # whether any of its actions has a weight, on any rank


def update(
    policy: Trainable, critic: Trainable | None, experience: Experience, config: PPOConfig, objective: Objective,
    generator: torch.Generator, budget: Portion,
) -> dict[str, float]:  # fmt: skip
    """Improve policy and critic on one batch of experience; returns the metrics of the steps that were taken.

    The roles take their steps one after the other, over the same minibatches: neither reads what the other has become,
    and only one of them needs to be on the device. The critic, which `score` used last, goes first, unless the policy's
    first forward has yet to say whether the experience can be trained on.

    `budget`: tokens per micro-batch. Where memory runs out, the gradient of the same minibatch is made again in smaller
    micro-batches: no step has been taken by then, and no random number drawn.
    """
    epochs = [_minibatches(experience, config, objective, generator) for _ in range(config.num_epochs)]
    minibatches = [m for epoch in epochs for m in epoch if m.trains]  # else a step would only follow Adam's momentum
    halves = [
        partial(_train_critic, critic, experience, minibatches, config, budget),
        partial(_train_policy, policy, experience, minibatches, config, objective, budget),
    ]
    if objective.check_gap is not None:
        halves.reverse()
        if critic is not None:
            critic.weights_at.leave()  # until its turn
    metrics: dict[str, float] = {}
    for half in halves:
        metrics |= half()
    return metrics


def _train_policy(
    policy: Trainable, experience: Experience, minibatches: list[Minibatch], config: PPOConfig, objective: Objective,
    budget: Portion,
) -> dict[str, float]:  # fmt: skip
    done: list[Stats] = []
    norms: list[float] = []
    before: dict[str, Tensor] = {}
    drift: float | None = None  # where the policy stopped
    with policy.here() if objective.train_policy else nullcontext():
        for minibatch in minibatches if objective.train_policy else ():
            fresh = objective.on_policy and not done  # nothing has moved: the ratio is 1 by definition
            measures = objective.check_gap is not None and not done
            stats = _policy_gradient(policy, experience, minibatch, config, objective, fresh, measures, budget)
            if measures:
                _check_gap(policy, stats, objective)
            if config.target_kl is not None and (kl := _mean(stats, "old_k3_sum")) > config.target_kl:
                drift = kl
                policy.zero_grad()
                if before:
                    policy.restore(before)
                break
            before.clear()  # there is room for one
            before = policy.snapshot() if config.roll_back else {}
            norm = policy.step(stats["policy_loss_sum"] + stats["kl_loss_sum"])
            if norm < math.inf:  # else the step was skipped
                done.append(stats)
                norms.append(norm)
    metrics = {"policy/early_stop": float(drift is not None), "policy/steps": float(len(norms))}
    metrics |= {} if drift is None else {"policy/kl_at_stop": drift}
    return metrics | _policy_metrics(done) | _norm_metric("policy", norms)


def _train_critic(
    critic: Trainable | None, experience: Experience, minibatches: list[Minibatch], config: PPOConfig, budget: Portion
) -> dict[str, float]:
    if critic is None:
        return {}
    done: list[Stats] = []
    norms: list[float] = []
    with critic.here():
        for minibatch in minibatches:
            stats = _value_gradient(critic, experience, minibatch, config, budget)
            norm = critic.step(stats["value_loss_sum"])
            if norm < math.inf:
                done.append(stats)
                norms.append(norm)
    return _value_metrics(done, config) | _norm_metric("critic", norms)


def _check_gap(policy: Trainable, stats: Stats, objective: Objective) -> None:
    """The first forward is also a probe of the sampler, before anything is trained on what it drew (P6)."""
    assert objective.check_gap is not None
    try:
        objective.check_gap(_mean(stats, "gap_sum"), float(stats["gap_max"]))
    except RolloutError:
        policy.zero_grad()
        raise


def _minibatches(
    experience: Experience, config: PPOConfig, objective: Objective, generator: torch.Generator
) -> list[Minibatch]:
    """A fresh permutation of the sequences, cut as evenly as possible: every sequence is trained on once per epoch."""
    order = torch.randperm(len(experience), generator=generator)
    counts = experience.action_cu_seqlens.diff().long()
    starts = experience.action_cu_seqlens[:-1].long()
    weights, out = torch.zeros_like(experience.advantages), []
    for sequences in order.to(counts.device).tensor_split(min(config.num_minibatches, len(order))):
        lengths = counts[sequences]
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        within = torch.arange(int(cu_seqlens[-1]), device=lengths.device) - cu_seqlens[:-1].repeat_interleave(lengths)
        actions = starts[sequences].repeat_interleave(lengths) + within
        own = loss_weights(experience.mask[actions], cu_seqlens, config.aggregation, objective.loss_divisor)
        weights[actions] = own
        trains = distributed.sum_over_ranks(own.any().long())
        out.append(Minibatch(sequences.tolist(), weights, bool(trains)))
    return out


def _policy_gradient(
    policy: Trainable, experience: Experience, minibatch: Minibatch, config: PPOConfig, objective: Objective,
    fresh: bool, measures: bool, budget: Portion,
) -> Stats:  # fmt: skip
    """Accumulate the gradient of the policy loss over the micro-batches; the loss is sum_i weights_i * l_i."""
    head = models.lm_head(policy.model)

    def backward(batch: MicroBatch) -> Stats:
        loss, stats = linear_ppo_loss(
            models.hidden_states(policy.model, batch)[batch.rows],
            head.weight,
            batch.targets,
            None if fresh else _take(experience.logprobs, batch),
            experience.advantages[batch.actions],
            minibatch.weights[batch.actions],
            bias=head.bias,
            temperature=objective.temperature,
            softcap=head.softcap,
            clip_low=config.clip_low if config.objective == "clip" else float("inf"),
            clip_high=config.clip_high if config.objective == "clip" else float("inf"),
            dual_clip=config.dual_clip,
            ref_logprobs=_take(experience.ref_logprobs, batch),
            kl_coef=objective.kl_coef if config.kl_in == "loss" else 0.0,
            kl_estimator=config.kl_estimator,
            old_kl_coef=objective.old_kl_coef,
            entropy_coef=config.entropy_coef,
            is_weights=_take(experience.is_weights, batch),
            sampler_logprobs=_take(experience.rollout.logprobs, batch) if measures else None,
        )
        loss.backward()
        return stats

    return _accumulated(policy, experience, minibatch, budget, backward)


def _value_gradient(
    critic: Trainable, experience: Experience, minibatch: Minibatch, config: PPOConfig, budget: Portion
) -> Stats:
    values, returns = experience.values, experience.returns
    assert values is not None and returns is not None
    head = models.value_head(critic.model)

    def backward(batch: MicroBatch) -> Stats:
        loss, stats = linear_value_loss(
            models.hidden_states(critic.model, batch)[batch.rows],
            head.weight[0],
            head.bias,
            values[batch.actions],
            returns[batch.actions],
            minibatch.weights[batch.actions],
            clip=config.value_clip,
        )
        (config.value_coef * loss).backward()
        return stats

    return _accumulated(critic, experience, minibatch, budget, backward)


def _accumulated(
    role: Trainable, experience: Experience, minibatch: Minibatch, budget: Portion,
    backward: Callable[[MicroBatch], Stats],
) -> Stats:  # fmt: skip
    """The statistics of a minibatch, `backward` having been through its micro-batches, on every rank."""
    lengths = experience.rollout.cu_seqlens.diff()[minibatch.sequences].tolist()

    def attempt(max_tokens: int) -> list[Stats]:
        return [backward(batch) for batch in microbatches(experience.rollout, max_tokens, minibatch.sequences)]

    parts = budget.run("the update", attempt, smallest=max(lengths), whole=sum(lengths), undo=role.zero_grad)
    return distributed.reduce_stats(merge_stats(parts))


def _take(x: Tensor | None, batch: MicroBatch) -> Tensor | None:
    return None if x is None else x[batch.actions]


def _mean(stats: Stats, name: str) -> float:
    return float(stats[name] / stats["token_count"].clamp(min=1))


def _policy_metrics(parts: list[Stats]) -> dict[str, float]:
    """Token-weighted means over all minibatches of the update."""
    if not parts:
        return {}
    total = merge_stats([{k: v for k, v in part.items() if not k.startswith("gap")} for part in parts])
    ratio = _mean(total, "ratio_sum")
    tokens = float(total["token_count"])
    squares = max(float(total["ratio_sq_sum"]), 1e-30)
    metrics = {
        "loss/policy_avg": float(total["policy_loss_sum"]) / len(parts),
        "policy/approxkl_avg": _mean(total, "old_k2_sum"),
        "policy/kl_avg": _mean(total, "old_k3_sum"),
        "policy/kl_last": _mean(parts[-1], "old_k3_sum"),
        "policy/clipfrac_avg": _mean(total, "clip_count"),
        "policy/clipfrac_first": _mean(parts[0], "clip_count"),
        "val/ratio": ratio,
        "val/ratio_var": max(_mean(total, "ratio_sq_sum") - ratio**2, 0.0),
        "val/ratio_max": float(total["ratio_max"]),
        "val/ratio_max_first": float(parts[0]["ratio_max"]),
        "val/ess": float(total["ratio_sum"]) ** 2 / (squares * max(tokens, 1.0)),
    }
    if "gap_sum" in parts[0]:
        metrics["rollout/logprob_gap_mean"] = _mean(parts[0], "gap_sum")
        metrics["rollout/logprob_gap_max"] = float(parts[0]["gap_max"])
    if "entropy_sum" in total:
        metrics["policy/entropy_avg"] = _mean(total, "entropy_sum")
    if "ref_k3_sum" in total:
        metrics["policy/ref_kl_avg"] = _mean(total, "ref_k3_sum")
        metrics["loss/kl_avg"] = float(total["kl_loss_sum"]) / len(parts)
    return metrics


def _value_metrics(parts: list[Stats], config: PPOConfig) -> dict[str, float]:
    if not parts:
        return {}
    total = merge_stats(parts)
    return {
        "loss/value_avg": float(total["value_loss_sum"]) / len(parts),
        "val/clipfrac_avg": _mean(total, "value_clip_count"),
    }


def _norm_metric(role: str, norms: list[float]) -> dict[str, float]:
    return {f"{role}/grad_norm": sum(norms) / len(norms)} if norms else {}
