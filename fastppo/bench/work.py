"""The least that each phase of a PPO iteration must do: bytes and operations, from the model and the lengths.

A token's forward takes 2 operations per weight of the body and 4 * width per layer and earlier token of its sequence
(scores and weighted values); a backward takes twice a forward; only rows of actions go through the LM head. What is
computed twice to save memory is not counted. Bytes are weights, keys and values, and the optimizer's state; activations
are left out, which makes the floors lower bounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from fastppo import models
from fastppo.bench.records import Work
from fastppo.optimizer import Trainable


@dataclass(frozen=True)
class Sizes:
    """A causal LM in numbers."""

    body: int
    """Weights that every token is multiplied with: all but embeddings and LM head."""
    head: int
    """V * H."""
    layers: int
    width: int
    """Attention heads times their size."""
    kv_bytes: int
    """Of one token's keys and values."""
    dtype: torch.dtype

    @staticmethod
    def of(policy: PreTrainedModel) -> Sizes:
        config: Any = policy.config.get_text_config()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        embeddings: Any = policy.get_input_embeddings()
        return Sizes(
            body=sum(p.numel() for p in policy.base_model.parameters()) - embeddings.weight.numel(),
            head=models.lm_head(policy).weight.numel(),
            layers=config.num_hidden_layers,
            width=config.num_attention_heads * head_dim,
            kv_bytes=models.kv_bytes_per_token(policy),
            dtype=policy.dtype,
        )

    def forward(self, lengths: Iterable[int], rows: int) -> float:
        """Operations of a forward over sequences, with `rows` rows through the LM head."""
        lengths = list(lengths)
        pairs = sum(n * (n + 1) / 2 for n in lengths)
        return 2.0 * self.body * sum(lengths) + 4.0 * self.layers * self.width * pairs + 2.0 * self.head * rows

    def weight_bytes(self, head: bool) -> float:
        return (self.body + head * self.head) * float(self.dtype.itemsize)


@dataclass(frozen=True)
class Batch:
    """Lengths of one iteration."""

    prompts: Sequence[int]
    responses: Sequence[int]

    @property
    def totals(self) -> list[int]:
        return [p + r for p, r in zip(self.prompts, self.responses, strict=True)]

    @property
    def tokens(self) -> int:
        return sum(self.totals)

    @property
    def actions(self) -> int:
        return sum(self.responses)


def phases(
    sizes: Sizes,
    batch: Batch,
    dtype: torch.dtype,
    *,
    epochs: int,
    minibatches: int,
    rows: int,
    state_bytes: float,
    trains_base: bool = True,
) -> dict[str, Work]:
    """The work of each phase.

    Args:
        dtype: that weights are multiplied in. (On a CPU the LM head alone is multiplied in float32 whatever it is.)
        rows: sequences decoded at a time.
        state_bytes: that one optimizer step of policy and critic must move; see `step_bytes`.
        trains_base: False for LoRA, whose backward makes no gradient of the weights: as much again as the forward.
    """
    scoring, valuing = sizes.forward(batch.totals, batch.actions), sizes.forward(batch.totals, 0)
    steps = max(max(batch.responses), batch.actions / rows)
    live = sum(r * p + r * r / 2 for p, r in zip(batch.prompts, batch.responses, strict=True))
    decoding = steps * sizes.weight_bytes(True) + live * sizes.kv_bytes
    return {
        "rollout": Work(decoding, scoring, dtype, batch.actions),
        "reward": Work(sizes.weight_bytes(False), valuing, dtype, batch.tokens),
        "logprobs": Work(sizes.weight_bytes(True), scoring, dtype, batch.tokens),
        "reference": Work(sizes.weight_bytes(True), scoring, dtype, batch.tokens),
        "values": Work(sizes.weight_bytes(False), valuing, dtype, batch.tokens),
        "advantages": Work(21.0 * batch.actions, 0.0, dtype, batch.tokens),
        "update": Work(
            epochs * minibatches * state_bytes,
            (3.0 if trains_base else 2.0) * epochs * (scoring + valuing),
            dtype,
            epochs * batch.tokens,
        ),
    }


def together(parts: Iterable[Work], tokens: float) -> Work:
    """All of them as one piece of work."""
    found = list(parts)
    return Work(sum(w.num_bytes for w in found), sum(w.flops for w in found), found[0].dtype, tokens)


def step_bytes(roles: Iterable[Trainable]) -> float:
    """Bytes that one optimizer step reads and writes: weights and moments both, the gradient once.

    From the optimizers' own state, which is there after the first step.
    """
    total = 0.0
    for role in roles:
        for master in (weight.master for weight in role.weights.values()):
            state = role.optimizer.state[master].values()
            moments = sum(x.numel() * x.element_size() for x in state if isinstance(x, torch.Tensor) and x.ndim)
            total += 3.0 * master.numel() * master.element_size() + 2.0 * moments
    return total
