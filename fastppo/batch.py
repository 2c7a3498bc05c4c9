"""What flows through a PPO iteration: Prompts -> Rollout -> Experience. Packed, token-in token-out.

Letters: B sequences, N packed tokens (prompt and response of all B, no padding), R actions (tokens the policy chose).
Padding exists nowhere here; masks come from lengths and from the rollout, never from token ids.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from fastppo.checks import require

FinishReason = Literal["stop", "length"]


def cumulative(lengths: Sequence[int] | Tensor) -> Tensor:
    """(B,) lengths -> (B + 1,) int32 offsets starting at 0."""
    lengths = torch.as_tensor(lengths, dtype=torch.int64)
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The distribution responses are drawn from. `top_k` and `top_p` are for evaluation; not for training."""

    temperature: float = 1.0
    max_new_tokens: int = 53
    stop_token_ids: tuple[int, ...] = ()
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    """Token ids one after the other that end a response, kept as its last tokens."""
    top_k: int = 0
    top_p: float = 1.0
    samples_per_prompt: int = 1
    seed: int | None = None
    """Draw from a generator of this seed instead of the engine's own, which then stays as it is: for evaluation."""

    def __post_init__(self) -> None:
        require(
            self.temperature > 0, f"temperature must be > 0, got {self.temperature}; for greedy decoding set top_k=1"
        )
        require(self.max_new_tokens > 0, f"max_new_tokens must be > 0, got {self.max_new_tokens}")
        require(all(self.stop_sequences), f"a stop sequence has at least one token, got {self.stop_sequences}")
        require(self.top_k >= 0, f"top_k must be >= 0 (0: off), got {self.top_k}")
        require(0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}")
        require(self.samples_per_prompt > 0, f"samples_per_prompt must be > 0, got {self.samples_per_prompt}")

    def seeded(self, generator: torch.Generator) -> "Sampling":
        """With a seed: its own, else one drawn from `generator`."""
        return self if self.seed is not None else replace(self, seed=int(torch.randint(2**31, (), generator=generator)))

    @property
    def truncated(self) -> bool:
        """Whether tokens are cut off the distribution, so that the sampler's log-probs are not the policy's."""
        return self.top_k > 0 or self.top_p < 1


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts of one iteration, as token ids, each with the record it came from (reward functions see it)."""

    token_ids: tuple[tuple[int, ...], ...]
    records: tuple[Mapping[str, Any], ...] = ()
    limits: tuple[int, ...] = ()
    """Most new tokens of each prompt; empty: `Sampling.max_new_tokens` of all."""

    def __post_init__(self) -> None:
        require(len(self.token_ids) > 0, "a batch needs at least one prompt, got none")
        for i, ids in enumerate(self.token_ids):
            require(len(ids) > 0, f"prompt {i} is empty: a policy needs at least one token to continue, e.g. BOS")
        if not self.records:
            object.__setattr__(self, "records", tuple({} for _ in self.token_ids))
        require(
            len(self.records) == len(self.token_ids),
            f"records must match the prompts one to one, got {len(self.records)} for {len(self.token_ids)} prompts",
        )
        require(
            not self.limits or (len(self.limits) == len(self.token_ids) and min(self.limits) > 0),
            f"limits must be one number > 0 per prompt ({len(self.token_ids)}) or none, got {self.limits}",
        )

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One response as a reward sees it."""

    prompt: str
    response: str
    """Text of the response, special tokens left out."""
    prompt_ids: list[int]
    response_ids: list[int]
    finish_reason: FinishReason
    record: Mapping[str, Any] = field(default_factory=dict)
    """The prompt's record from the data file, e.g. with the answer in it."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Sampled sequences. Build one from any source with `Rollout.pack`."""

    input_ids: Tensor  # (N,) int64
    cu_seqlens: Tensor  # (B + 1,) int32
    prompt_lengths: Tensor  # (B,) int64
    loss_mask: Tensor  # (N,) bool, True where the token is an action of the policy
    finish_reasons: tuple[FinishReason, ...]  # B of them
    logprobs: Tensor | None  # (R,) float32, of the sampler
    group_ids: Tensor  # (B,) int64, which prompt a sequence belongs to
    records: tuple[Mapping[str, Any], ...]
    sampling: Sampling | None = None  # None: the caller vouches that actions were drawn from some policy
    exact: bool = False  # logprobs were computed by the trainer's own module in float32
    policy_version: int | None = None  # of the policy that was sampled

    @staticmethod
    def pack(
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        *,
        finish_reasons: Sequence[FinishReason] | None = None,
        loss_masks: Sequence[Sequence[bool]] | None = None,
        logprobs: Sequence[Sequence[float]] | None = None,
        group_ids: Sequence[int] | None = None,
        records: Sequence[Mapping[str, Any]] = (),
        sampling: Sampling | None = None,
        exact: bool = False,
        policy_version: int | None = None,
        device: torch.device | str = "cpu",
    ) -> "Rollout":
        """Pack trajectories from anywhere: token ids in, token ids trained on.

        Args:
            prompts: B lists of at least one token id.
            responses: B lists of token ids; may be empty.
            finish_reasons: "stop" (ended by itself) or "length" (cut); default "stop".
            loss_masks: per response token, False for tokens the policy did not choose (tool output).
            logprobs: per response token, natural log, of the policy that sampled; entries at masked tokens are ignored.
            group_ids: sequences with one id answer one prompt; default: all different.

        Raises:
            ValueError: lengths that do not match, an empty prompt, an unknown finish reason, a log-prob that is not a
                finite number <= 0.
        """
        B = len(prompts)
        require(B > 0, "a rollout needs at least one sequence, got none")
        _require_length("responses", responses, B)
        lengths = [len(r) for r in responses]
        reasons: tuple[FinishReason, ...] = tuple(finish_reasons) if finish_reasons is not None else ("stop",) * B
        _require_length("finish_reasons", reasons, B)
        for reason in reasons:
            require(reason in ("stop", "length"), f"finish_reason must be 'stop' or 'length', got {reason!r}")
        for i, prompt in enumerate(prompts):
            require(len(prompt) > 0, f"prompt {i} is empty: the first action needs a token before it")
        masks = [[True] * n for n in lengths] if loss_masks is None else loss_masks
        _require_nested("loss_masks", masks, lengths)
        group_ids = list(range(B)) if group_ids is None else list(group_ids)
        _require_length("group_ids", group_ids, B)
        records = tuple(records) or tuple({} for _ in range(B))
        _require_length("records", records, B)
        tokens = [t for p, r in zip(prompts, responses, strict=True) for t in (*p, *r)]
        bad = [t for t in tokens if not t >= 0 or t % 1]
        require(not bad, f"token ids must be integers >= 0, got {bad[:1]}")
        mask = [m for p, row in zip(prompts, masks, strict=True) for m in (*[False] * len(p), *row)]
        return Rollout(
            input_ids=torch.tensor(tokens, dtype=torch.int64, device=device),
            cu_seqlens=cumulative([len(p) + n for p, n in zip(prompts, lengths, strict=True)]).to(device),
            prompt_lengths=torch.tensor([len(p) for p in prompts], dtype=torch.int64, device=device),
            loss_mask=torch.tensor(mask, dtype=torch.bool, device=device),
            finish_reasons=reasons,
            logprobs=None if logprobs is None else _pack_logprobs(logprobs, masks, lengths).to(device),
            group_ids=torch.tensor(group_ids, dtype=torch.int64, device=device),
            records=records,
            sampling=sampling,
            exact=exact,
            policy_version=policy_version,
        )

    def __len__(self) -> int:
        return len(self.finish_reasons)

    def to(self, device: torch.device) -> "Rollout":
        """The same rollout with its tensors on `device`."""
        if self.input_ids.device == device:
            return self
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})

    def where(self, keep: Tensor) -> "Rollout":
        """The sequences for which `keep`, (B,) bool, is true."""
        lengths = self.cu_seqlens.diff().long()
        tokens, chosen = keep.repeat_interleave(lengths), keep.tolist()
        return replace(
            self,
            input_ids=self.input_ids[tokens],
            cu_seqlens=cumulative(lengths[keep]),
            prompt_lengths=self.prompt_lengths[keep],
            loss_mask=self.loss_mask[tokens],
            finish_reasons=tuple(itertools.compress(self.finish_reasons, chosen)),
            logprobs=None if self.logprobs is None else self.logprobs[tokens[self.loss_mask]],
            group_ids=self.group_ids[keep],
            records=tuple(itertools.compress(self.records, chosen)),
        )

    @property
    def action_index(self) -> Tensor:
        """(R,) int64 position of every action among the N packed tokens."""
        return self.loss_mask.nonzero().squeeze(1)

    @cached_property
    def action_places(self) -> Tensor:
        """(N,) int64 place among the R actions of a token that is one. Kept: every micro-batch looks some up."""
        return self.loss_mask.cumsum(0) - 1

    @property
    def action_counts(self) -> Tensor:
        """(B,) int64 number of actions of each sequence."""
        ends = torch.cat([self.loss_mask.new_zeros(1, dtype=torch.int64), self.loss_mask.cumsum(0)])
        return ends[self.cu_seqlens[1:].long()] - ends[self.cu_seqlens[:-1].long()]

    @property
    def truncated(self) -> Tensor:
        """(B,) bool, True where the response was cut by its length limit."""
        return torch.tensor([r == "length" for r in self.finish_reasons], device=self.input_ids.device)

    def sequences(self) -> list[tuple[list[int], list[int]]]:
        """B pairs of prompt ids and response ids."""
        ids, ends, prompt = self.input_ids.tolist(), self.cu_seqlens.tolist(), self.prompt_lengths.tolist()
        spans = zip(ends[:-1], ends[1:], prompt, strict=True)
        return [(ids[a : a + p], ids[a + p : b]) for a, b, p in spans]


@dataclass(frozen=True, kw_only=True)
class Experience:
    """A scored rollout, ready for `update`. Per-action tensors are float32 of shape (R,), in packed order."""

    rollout: Rollout
    action_cu_seqlens: Tensor  # (B + 1,) int32, the actions of each sequence
    logprobs: Tensor | None  # of the policy before the update; None when nothing needs them
    ref_logprobs: Tensor | None  # None without a KL term
    values: Tensor | None  # None without a critic
    rewards: Tensor  # per token, KL included when it is in the reward
    advantages: Tensor
    returns: Tensor | None  # None without a critic
    mask: Tensor  # (R,) bool, False: the action is left out of the loss
    is_weights: Tensor | None  # truncated importance weights, or None
    policy_version: int  # of the policy that `logprobs` belongs to
    logprobs_are_policys: bool  # False: they are another engine's account of it, so the ratio may start off 1
    metrics: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rollout)


def _require_length(name: str, value: Sequence[Any], expected: int) -> None:
    require(len(value) == expected, f"{name} must have one entry per prompt ({expected}), got {len(value)}")


def _require_nested(name: str, value: Sequence[Sequence[Any]], lengths: Sequence[int]) -> None:
    _require_length(name, value, len(lengths))
    for i, (row, n) in enumerate(zip(value, lengths, strict=True)):
        require(len(row) == n, f"{name}[{i}] must have one entry per response token ({n}), got {len(row)}")


def _pack_logprobs(
    logprobs: Sequence[Sequence[float]], masks: Sequence[Sequence[bool]], lengths: Sequence[int]
) -> Tensor:
    _require_nested("logprobs", logprobs, lengths)
    flat = [x for row, mask in zip(logprobs, masks, strict=True) for x, keep in zip(row, mask, strict=True) if keep]
    packed = torch.tensor(flat, dtype=torch.float32)
    require(
        bool((packed.isfinite() & (packed <= 1e-4)).all()),
        "logprobs must be finite natural logarithms <= 0 at every action; got "
        f"{packed[~(packed.isfinite() & (packed <= 1e-4))][:3].tolist()}",
    )
    return packed
