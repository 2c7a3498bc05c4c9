"""What a run is made of: its models, prompts and rewards."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from fastppo.checks import require, require_positive

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The policy; the reference is its initial copy unless `reference` names another checkpoint."""

    path: str
    """Local folder or hub name; no default, so that a run never starts on the wrong model."""
    reference: str | None = None
    """Checkpoint of the reference; None: the policy as it was before the first update."""
    dtype: Dtype = "float32"
    """Dtype of the weights. Log-probs, ratios, advantages and losses are float32 with either."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CriticConfig:
    """The value model. N+ starts it from the reward model; the default here is the policy, which every run has."""

    init: str = "policy"
    """`policy` (zero value head), `reward` (the first reward model and its head), or a checkpoint."""
    gradient_checkpointing: bool = False
    """As `policy.gradient_checkpointing`, for the critic."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig:
    """One source of scores; several are added up with their weights."""

    kind: Literal["model", "function", "http"]
    """What scores: a sequence classifier, a Python function, or an HTTP endpoint."""
    target: str
    """Checkpoint of a sequence classifier, `module:function`, or a URL."""
    weight: float = 1.0
    """Factor on its scores in the sum; 0: only logged."""
    name: str = ""
    """Name in the logs; empty: made from `target`."""
    dtype: Dtype = "float32"
    """Dtype of a reward model's weights."""
    label: int = 0
    """Which logit of a reward model with several labels is the score."""
    batch_size: int = 64
    """Samples per forward of a reward model, or per request of an endpoint."""
    timeout_s: float = 60.0
    """Seconds until one call of a function or an endpoint has failed."""
    retries: int = 3
    """Further tries of an endpoint after a failure; the wait doubles from 0.5 s."""
    early: bool = False
    """Score responses as they end, up to batch_size in a call, while others are sampled; for a function or an endpoint
    that judges each response by itself."""
    trust_remote_code: bool = False
    """Run Python code that comes with a reward model's checkpoint."""

    def __post_init__(self) -> None:
        form = {"model": ".", "function": ".+:.", "http": "https?://."}[self.kind]
        legal = {"model": "a checkpoint", "function": "'module:function'", "http": "a URL with http://"}[self.kind]
        wrong = f"rewards.target of kind {self.kind!r} must be {legal}, got {self.target!r}"
        require(re.match(form, self.target) is not None, wrong)
        require(math.isfinite(self.weight), f"rewards.weight must be finite, got {self.weight}")
        require(
            not self.early or self.kind != "model",
            "rewards.early is for kind 'function' and 'http': a reward model would compete with the sampler",
        )
        require_positive("rewards", self, "batch_size", "timeout_s")
        require(self.retries >= 0, f"rewards.retries must be >= 0, got {self.retries}")

    @property
    def log_name(self) -> str:
        """What the logs call it."""
        return self.name or self.target.rstrip("/").split("/")[-1].split(":")[-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where prompts come from: a JSONL file of records, or `module:function` that returns an iterable of them."""

    prompts: str
    """JSONL file, or `module:function`."""
    eval_prompts: str | None = None
    """Held-out prompts; None: no evaluation."""
    field: str = "prompt"
    """Key of the record that holds the prompt: text, a list of token ids, or a list of chat messages."""
    template: str = "{prompt}"
    """Text around the prompt; `{prompt}` is replaced. Not used for token ids and chat messages."""
    chat: bool = False
    """Put the text into one user message of the tokenizer's chat template."""
    max_prompt_tokens: int = 1024
    """A longer prompt is an error: nothing is cut in silence."""
    skip_long: bool = False
    """Leave prompts over the limit out instead, and log how many."""

    def __post_init__(self) -> None:
        require("{prompt}" in self.template, f"data.template must contain '{{prompt}}', got {self.template!r}")
        require_positive("data", self, "max_prompt_tokens")
