"""Scalar settings of the ops: frozen, checked once, shared by every backend."""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, TypedDict

KL_ESTIMATORS = ("k1", "k2", "k3", "k1+", "k3+")
"""Value of the named estimator; a trailing "+" gives that value the gradient of k2 (straight-through)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadSettings:
    """How logits z become log-probabilities: log_softmax(softcap * tanh(z / softcap) / temperature).

    Raises:
        ValueError: a field lies outside its range.
    """

    temperature: float = 1.0
    """Divides the (soft-capped) logits; finite and > 0."""
    softcap: float | None = None
    """Bound of the tanh soft-cap, finite and > 0; None leaves the logits alone."""

    def __post_init__(self) -> None:
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature must be finite and > 0, got {self.temperature}; the greedy limit is sample(..., top_k=1)"
            )
        if self.softcap is not None and not 0.0 < self.softcap < math.inf:
            raise ValueError(f"softcap must be finite and > 0, got {self.softcap}; pass None for no soft-cap")


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeSettings:
    """Which positions a new token looks at, and how they are scored.

    Raises:
        ValueError: a field lies outside its range.
    """

    scale: float
    """Of the scores, > 0."""
    span: int
    """Upper bound of positions + 1, for which memory and programs are sized."""
    window: int | None = None
    """Positions that are looked at, the new one included, >= 1; None: all."""
    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap), > 0; None: as they are."""

    def __post_init__(self) -> None:
        if not 0.0 < self.scale < math.inf:
            raise ValueError(f"scale must be finite and > 0, got {self.scale}; the usual one is D ** -0.5")
        if (self.window is not None and self.window < 1) or (self.softcap is not None and not self.softcap > 0):
            raise ValueError(
                f"window must be >= 1 and softcap > 0, got {self.window} and {self.softcap}; None switches either off"
            )

    @property
    def reach(self) -> int:
        """Positions that are looked at at most."""
        return self.span if self.window is None else self.window


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedSettings:
    """Which tokens of its sequence a token looks at, and how they are scored.

    Raises:
        ValueError: a field lies outside its range.
    """

    scale: float
    """Of the scores, > 0."""
    window: int | None = None
    """Tokens that are looked at, the query's own included, >= 1; None: all."""

    def __post_init__(self) -> None:
        if not 1e-30 < self.scale < 1e30:  # its reciprocal is a float32 too
            raise ValueError(f"scale must be finite and > 0, got {self.scale}; the usual one is D ** -0.5")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be >= 1, got {self.window}; None switches it off")


class PPOOptions(TypedDict, total=False):
    """The keywords of the PPO losses; `PPOSettings` says what each means, its default and its range."""

    clip_low: float
    clip_high: float
    dual_clip: float | None
    kl_coef: float
    kl_estimator: str
    entropy_coef: float
    old_kl_coef: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PPOSettings:
    """Coefficients of the PPO objective of one token (see `reference.ppo_token_terms`).

    Raises:
        ValueError: a field lies outside its range.
    """

    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low; in [0, 1), or math.inf for no lower clip."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high; >= 0, math.inf for no upper clip."""
    dual_clip: float | None = None
    """c > 1: for negative advantages the surrogate is at most -c * advantage. None switches it off."""
    kl_coef: float = 0.0
    """Weight of the penalty KL(policy || reference); >= 0, and > 0 needs ref_logprobs."""
    kl_estimator: str = "k3"
    """One of KL_ESTIMATORS."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, subtracted from the loss; any finite number."""
    old_kl_coef: float = 0.0
    """Weight of the penalty KL(old policy || policy); >= 0."""

    def __post_init__(self) -> None:
        if not (0.0 <= self.clip_low < 1.0 or self.clip_low == math.inf):
            raise ValueError(f"clip_low must be in [0, 1), got {self.clip_low}; pass math.inf for no lower clip")
        if not self.clip_high >= 0.0:
            raise ValueError(f"clip_high must be >= 0, got {self.clip_high}; pass math.inf for no upper clip")
        if self.dual_clip is not None and not self.dual_clip > 1.0:
            raise ValueError(f"dual_clip must be > 1, got {self.dual_clip}; pass None for no dual clip")
        for name in ("kl_coef", "old_kl_coef"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and >= 0, got {getattr(self, name)}; 0 switches it off")
        if not math.isfinite(self.entropy_coef):
            raise ValueError(f"entropy_coef must be finite, got {self.entropy_coef}; 0 switches it off")
        if self.kl_estimator not in KL_ESTIMATORS:
            raise ValueError(f"kl_estimator must be one of {', '.join(KL_ESTIMATORS)}, got {self.kl_estimator!r}")

    def encoded(self) -> list[float]:
        """As numbers, the way they pass through an operator of torch.library."""
        fields = dict(zip(PPOSettings.__slots__, astuple(self), strict=True))
        fields["kl_estimator"] = float(KL_ESTIMATORS.index(self.kl_estimator))
        return [math.nan if value is None else float(value) for value in fields.values()]

    @classmethod
    def decoded(cls, numbers: Sequence[float]) -> "PPOSettings":
        """The inverse of `encoded`."""
        fields: dict[str, Any] = dict(zip(cls.__slots__, numbers, strict=True))
        fields["kl_estimator"] = KL_ESTIMATORS[int(fields["kl_estimator"])]
        fields["dual_clip"] = None if math.isnan(fields["dual_clip"]) else fields["dual_clip"]
        return cls(**fields)
