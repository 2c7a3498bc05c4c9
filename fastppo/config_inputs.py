"""What a run is made of: its models, prompts and rewards."""

import math
import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from fastppo.checks import require, require_positive

Dtype = Literal["float32", "bfloat16"]
HIDDEN = "***"  # in place of a secret, where a run writes down its config


def shown(wrong_url: str) -> str:
    """To be quoted in an error: all of it, or nothing where it may hold a secret, nobody knows where."""
    return HIDDEN if set("@?") & set(wrong_url) else repr(wrong_url)


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return bool(parts.hostname) and ("$" in parts.netloc or parts.port != 0)  # the port of no number raises
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The policy; the reference is its initial copy unless `reference` names another checkpoint."""

    path: str
    """Local folder or hub name; no default, so that a run never starts on the wrong model."""
    reference: str | None = None
    """Checkpoint of the reference; None: the policy as it was before the first update."""
    dtype: Dtype = "float32"
    """Dtype of the weights. Log-probs, ratios, advantages and losses are float32 with either."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CriticConfig:
    """The value model. N+ starts it from the reward model; the default here is the policy, which every run has."""

    init: str = "policy"
    """`policy` (zero value head), `reward` (the first reward model and its head), or a checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig:
    """One source of scores; several are added up with their weights."""

    kind: Literal["model", "function", "http"]
    """What scores: a sequence classifier, a Python function, or an HTTP endpoint."""
    target: str
    """Checkpoint of a sequence classifier, `module:function`, or a URL, in which ${NAME} stands for a variable of the
    environment: what a run writes down has neither the password nor the query of a URL, but does have ${NAME}."""
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
    """Further tries after an endpoint failed, or anything with on_error = "retry"; the wait doubles, 0.5 s to 60 s."""
    early: bool = False
    """Score responses as they end, up to batch_size in a call, while others are sampled; for a function or an endpoint
    that judges each response by itself."""
    on_error: Literal["fail", "retry", "skip"] = "fail"
    """When it raises, does not answer or gives what is no score: end the run; ask `retries` more times, then end it;
    or leave the samples without a score out of the iteration, a function's being asked for one by one."""
    trust_remote_code: bool = False
    """Run Python code that comes with a reward model's checkpoint."""

    def __post_init__(self) -> None:
        form = {"model": ".", "function": ".+:.", "http": r"https?://[^\x00-\x20\x7f]+\Z"}[self.kind]
        legal = {"model": "a checkpoint", "function": "'module:function'", "http": "a URL with http://"}[self.kind]
        got = shown(self.target) if self.kind == "http" else repr(self.target)
        wrong = f"rewards.target of kind {self.kind!r} must be {legal}, got {got}"
        require(re.match(form, self.target) is not None, wrong)
        require(self.kind != "http" or _is_url(self.target), wrong)
        require(
            self.kind != "http" or HIDDEN not in self.target,
            f"rewards.target {self.target!r} is what a run wrote down of a URL with a secret: give the URL itself, "
            "best with ${NAME}, a variable of the environment, in its place",
        )
        require(math.isfinite(self.weight), f"rewards.weight must be finite, got {self.weight}")
        require(
            not self.early or self.kind != "model",
            "rewards.early is for kind 'function' and 'http': a reward model would compete with the sampler",
        )
        require(
            not self.early or self.on_error == "fail",
            f"rewards.early asks once, so rewards.on_error must be 'fail', got {self.on_error!r}",
        )
        require_positive("rewards", self, "batch_size", "timeout_s")
        require(self.retries >= 0, f"rewards.retries must be >= 0, got {self.retries}")

    @property
    def log_name(self) -> str:
        """What the logs call it."""
        target = self.target.partition("?")[0] if self.kind == "http" else self.target
        return self.name or target.rstrip("/").split("/")[-1].split("@")[-1].split(":")[-1]


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
