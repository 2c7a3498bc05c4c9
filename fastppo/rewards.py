"""Scores for responses: a reward model, a Python function, an HTTP endpoint, or a weighted sum of several.

Each reward maps samples to numbers; `WeightedRewards` checks them, adds them up and keeps every part for the logs. A
score that is not a finite number is an error that names the sample: nothing is replaced in silence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastppo.aggregate import sequence_sums
from fastppo.batch import Prompts, Rollout, Sample, cumulative
from fastppo.checks import require
from fastppo.config import DataConfig, RewardConfig
from fastppo.config_offload import FrozenWay
from fastppo.early_scores import EarlyScores, Heard
from fastppo.endpoints import FunctionReward, HTTPReward, RewardError
from fastppo.protocols import Reward
from fastppo.reward_errors import OnError, ask, plain
from fastppo.reward_model import reward_model_of

LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Scores:
    """What the rewards say of a rollout, weights applied."""

    sequences: Tensor  # (B,) float32, one score per response
    tokens: Tensor | None  # (R,) float32, scores of single actions, or None
    parts: dict[str, Tensor]  # (B,) float32 per reward, before its weight
    missing: dict[int, str] = field(default_factory=dict)  # why a sequence has no score and is to be left out
    counts: dict[str, float] = field(default_factory=dict)  # metrics that add up over ranks

    def totals(self, rollout: Rollout) -> Tensor:
        """(B,) all that each response earned: its score and those of its actions."""
        if self.tokens is None:
            return self.sequences
        return self.sequences + sequence_sums(self.tokens, cumulative(rollout.action_counts))


class WeightedRewards:
    """Scores a rollout with every reward and adds them up: sum_k weight_k * score_k.

    Args:
        rewards: what scores the samples.
        weights: one per reward; default 1.
        tokenizer: turns ids into the text that rewards see; None: the text is empty.
        early: names of those that score responses as they end, each with the most samples of one call.
        on_errors: what becomes of a failure, one per reward; default: it is raised.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        *,
        weights: Sequence[float] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        early: Mapping[str, int] | None = None,
        on_errors: Sequence[OnError] | None = None,
    ) -> None:
        self.rewards = list(rewards)
        self.weights = [1.0] * len(self.rewards) if weights is None else list(weights)
        self.on_errors = [OnError()] * len(self.rewards) if on_errors is None else list(on_errors)
        self.tokenizer, self.early = tokenizer, dict(early or {})
        names = [r.name for r in self.rewards]
        require(self.early.keys() <= {*names}, f"early rewards must be among {names}, got {sorted(self.early)}")
        require(len(self.rewards) > 0, "at least one reward is needed, got none")
        require(len(self.weights) == len(names), f"got {len(self.weights)} weights for {len(names)} rewards")
        require(len(set(names)) == len(names), f"rewards need different names, got {names}: set rewards.name")

    def listen(self, prompts: Prompts, samples_per_prompt: int) -> EarlyScores | None:
        """The `on_finish` of a rollout, to be given back with it; None: no reward is early."""
        chosen = {r.name: (r, self.early[r.name]) for r in self.rewards if r.name in self.early}
        to_sample = partial(_only_sample, tokenizer=self.tokenizer)
        return EarlyScores(prompts, samples_per_prompt, chosen, to_sample) if chosen else None

    def __call__(self, rollout: Rollout, early: EarlyScores | None = None) -> Scores:
        """`early`: what heard of these responses as they ended.

        Raises:
            RewardError: a reward failed, or returned NaN, infinity or the wrong number of scores, and its `OnError`
                does not help.
        """
        samples, device = to_samples(rollout, self.tokenizer), rollout.input_ids.device
        sequences = torch.zeros(len(rollout), device=device)
        tokens = torch.zeros(int(rollout.loss_mask.sum()), device=device)
        any_tokens, parts, missing = False, {}, {}
        counts = {"rollout/left_out": 0.0} if any(o.way == "skip" for o in self.on_errors) else {}
        for reward, weight, on_error in zip(self.rewards, self.weights, self.on_errors, strict=True):
            heard = reward if early is None else Heard(reward, early)
            asked = ask(heard, samples, on_error, partial(check_scores, rollout=rollout, name=reward.name))
            per_sequence, per_token = asked.scores
            missing |= asked.missing
            counts |= {f"reward/{reward.name}/{what}": float(n) for what, n in asked.counts.items()}
            per_sequence = parts[reward.name] = per_sequence.to(device)
            if per_token is None:
                sequences += weight * per_sequence
            else:
                any_tokens = True
                tokens += weight * per_token.to(device)
        return Scores(sequences, tokens if any_tokens else None, parts, missing, counts)


def load_rewards(
    configs: Sequence[RewardConfig],
    policy_tokenizer: PreTrainedTokenizerBase | None,
    device: torch.device,
    data: DataConfig | None = None,
    base: PreTrainedModel | None = None,
    offload: FrozenWay = "keep",
) -> WeightedRewards:
    """Build what a run file's [[rewards]] tables describe.

    Args:
        data: which prompts are chats.
        base: a policy with adapters; a reward model that is adapters too goes on the same base.
        offload: where the models are between two calls.
    """
    rewards = [endpoint_of(c) or reward_model_of(c, policy_tokenizer, device, data, base, offload) for c in configs]
    early = {c.log_name: c.batch_size for c in configs if c.early}
    on_errors = [OnError(c.on_error, c.retries) for c in configs]
    weights = [c.weight for c in configs]
    return WeightedRewards(rewards, weights=weights, tokenizer=policy_tokenizer, early=early, on_errors=on_errors)


def endpoint_of(config: RewardConfig) -> FunctionReward | HTTPReward | None:
    """The reward of kind "function" or "http", without calling it; None for a reward model.

    Raises:
        ValueError: the function cannot be imported or is none, or a variable in the URL is not set.
    """
    if config.kind == "model":
        return None
    if config.kind == "function":
        return FunctionReward(config.target, name=config.log_name, timeout_s=config.timeout_s)
    return HTTPReward(
        config.target,
        name=config.log_name,
        batch_size=config.batch_size,
        timeout_s=config.timeout_s,
        retries=config.retries,
    )


def to_samples(rollout: Rollout, tokenizer: PreTrainedTokenizerBase | None) -> list[Sample]:
    """Decode a rollout for reward functions and logs. Decoded text is never encoded again to be trained on."""
    pairs = rollout.sequences()
    prompts, responses = (_decode(tokenizer, ids) for ids in zip(*pairs, strict=True))
    return [
        Sample(prompt=p, response=r, prompt_ids=a, response_ids=b, finish_reason=reason, record=record)
        for p, r, (a, b), reason, record in zip(
            prompts, responses, pairs, rollout.finish_reasons, rollout.records, strict=True
        )
    ]


def _only_sample(rollout: Rollout, *, tokenizer: PreTrainedTokenizerBase | None) -> Sample:
    return to_samples(rollout, tokenizer)[0]


def check_scores(
    scores: Any, rollout: Rollout, name: str, missing: dict[int, str] | None = None
) -> tuple[Tensor, Tensor | None]:
    """Per-sequence scores (B,) and, when per-token lists were given, their (R,) tensor; sums them in the first.

    `missing`: samples that have no score, whose entries are not looked at and become 0. It takes in those whose entry
    is no score; None: they are an error.
    """
    scores = plain(scores)
    if not isinstance(scores, list | tuple) or len(scores) != len(rollout):
        got = f"{len(scores)} scores" if isinstance(scores, list | tuple) else f"a {type(scores).__name__}"
        raise RewardError(f"reward {name!r} must return one score per sample ({len(rollout)}), got {got}")
    known = missing or {}
    kinds = {isinstance(score, list | tuple) for i, score in enumerate(scores) if i not in known}
    if len(kinds) > 1:
        raise RewardError(f"reward {name!r} gave lists for some samples and numbers for others: give one kind")
    nested, found = kinds == {True}, {}
    for i, score in enumerate(scores):
        for x in () if i in known else score if nested else [score]:
            if not (isinstance(x, int | float) and abs(x) <= LARGEST):  # False for NaN too
                found[i] = f"reward {name!r} gave {x!r:.80} for sample {i}: a score must be a finite number"
                break
    if found and missing is None:
        raise RewardError(next(iter(found.values())))
    if missing is not None:
        missing |= found
    lengths = (rollout.cu_seqlens.diff() - rollout.prompt_lengths).tolist()
    none = {i: [0.0] * lengths[i] if nested else 0.0 for i in missing or ()}
    scores = [none.get(i, score) for i, score in enumerate(scores)]
    if not nested:
        return torch.tensor([float(s) for s in scores]), None
    return torch.tensor([float(sum(s)) for s in scores]), _token_scores(scores, rollout, name)


def _token_scores(scores: Sequence[Sequence[float]], rollout: Rollout, name: str) -> Tensor:
    """Per response token -> per action. A score on a token the policy did not choose would be lost: it is refused."""
    lengths = (rollout.cu_seqlens.diff() - rollout.prompt_lengths).tolist()
    flat = torch.zeros(rollout.input_ids.shape[0])
    starts = (rollout.cu_seqlens[:-1] + rollout.prompt_lengths).tolist()
    for i, (row, start, length) in enumerate(zip(scores, starts, lengths, strict=True)):
        if len(row) != length:
            wrong = f"gave {len(row)} token scores for the {length} response tokens of sample {i}"
            raise RewardError(f"reward {name!r} {wrong}")
        flat[start : start + length] = torch.tensor([float(x) for x in row])
    mask = rollout.loss_mask.cpu()
    if bool((flat[~mask] != 0).any()):
        raise RewardError(f"reward {name!r} scores tokens outside the loss mask; score the next action instead")
    return flat[mask]


def _decode(tokenizer: PreTrainedTokenizerBase | None, ids: Sequence[list[int]]) -> list[str]:
    return [""] * len(ids) if tokenizer is None else tokenizer.batch_decode(list(ids), skip_special_tokens=True)
