"""The objective of PPO, and what surrounds it: `[ppo]`."""

import math
from dataclasses import dataclass
from typing import Literal

from fastppo.checks import require, require_positive, require_unit

AdvantageEstimator = Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce++"]
Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant"]
KLEstimator = Literal["k1", "k2", "k3", "k1+", "k3+"]
Truncation = Literal["none", "penalty", "bootstrap", "mask"]

GROUPED: tuple[AdvantageEstimator, ...] = ("grpo", "dr_grpo", "rloo")


@dataclass(frozen=True, kw_only=True, slots=True)
class PPOConfig:
    """The objective (Schulman et al. 2017, arXiv:1707.06347) and what surrounds it."""

    num_epochs: int = 4
    """Passes over each rollout batch."""
    num_minibatches: int = 1
    """Optimizer steps per pass; must divide the sequences of a rollout."""
    max_tokens_per_microbatch: int = 16384
    """Tokens per forward, on a CPU a sixteenth or 7 more at most; bounds memory, changes no result."""
    clip_low: float = 0.2
    """The ratio is clipped at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped at 1 + clip_high (clip-higher, arXiv:2503.14476, when larger than clip_low)."""
    dual_clip: float | None = None
    """c > 1: for negative advantages the loss is at most -c * advantage (arXiv:1912.09729)."""
    objective: Literal["clip", "kl-penalty"] = "clip"
    """`kl-penalty`: no clipping, but old_kl_coef * KL(old || new), adapted after every update (PPO paper, eq. 8)."""
    old_kl_coef: float = 1.0
    """Initial coefficient of the kl-penalty objective."""
    old_kl_target: float = 0.01
    """Nats per token that the kl-penalty objective adapts to."""
    value_clip: float | None = 0.2
    """Values move at most this far from the old ones in the value loss; None: no clipping."""
    value_coef: float = 0.1
    """Weight of the value loss. The critic has its own Adam, so it acts through eps and max_grad_norm only."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus in the policy loss; 0: none."""
    gamma: float = 1.0
    """Discount per token, in [0, 1]."""
    lam: float = 0.95
    """GAE's lambda; without a critic it has no part."""
    advantage: AdvantageEstimator = "gae"
    """Estimator: `gae` has a critic; grpo, dr_grpo and rloo compare samples of one prompt; `reinforce++` whitens."""
    whiten_advantages: bool = True
    """For gae and reinforce++; the group estimators are normalised by their groups."""
    whiten_rewards: bool = False
    """Divide per-token rewards by their standard deviation (their mean is kept)."""
    normalize_scores: bool = False
    """Subtract the running mean of the scores and divide by their running standard deviation."""
    clip_scores: float | None = None
    """Scores are clamped to [-clip_scores, clip_scores], after normalisation."""
    truncation: Truncation = "penalty"
    """A response cut by max_new_tokens: gets `missing_eos_score`; is bootstrapped with V of its last state; is left
    out of the loss (mask); or nothing special."""
    missing_eos_score: float = -1.0
    """With truncation `penalty`, the score that a cut response gets instead of its own."""
    kl_coef: float = 0.05
    """Weight of the KL to the reference, in reward units per nat."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL to the reference acts: taken from the reward of each token, or added to the policy loss."""
    kl_estimator: KLEstimator = "k1"
    """k1 in the reward has the gradient of KL(policy || reference); in the loss only k2, k1+ and k3+ have."""
    kl_target: float | None = None
    """Adaptive controller (arXiv:1909.08593, section 2.2): nats per response to steer to; None: fixed kl_coef."""
    kl_horizon: int = 10000
    """Responses over which the adaptive controller corrects."""
    target_kl: float | None = None
    """Leave the policy alone for the rest of the update once a minibatch is farther than this from the old policy (mean
    k3 per token, before its step); the critic goes on. What the last step does is seen in the next iteration."""
    roll_back: bool = False
    """When target_kl stops the update, also undo the step that went too far; keeps a copy of weights and Adam state."""
    aggregation: Aggregation = "token-mean"
    """Weight of a token in its minibatch, in order: 1/tokens, 1/(responses * its response's tokens), 1/responses,
    1/(responses * loss_divisor)."""
    loss_divisor: int | None = None
    """Tokens per sequence that `constant` aggregation divides by (Dr.GRPO, arXiv:2503.20783); None: max_new_tokens."""
    importance_cap: float | None = None
    """Truncated importance weight min(trainer / sampler, cap) on every token; None: off. Needs recomputed log-probs."""
    max_skipped_steps: int = 8
    """Optimizer steps in a row that may be skipped because loss or gradient was not finite; 0: no limit."""
    on_max_skipped: Literal["stop", "roll_back"] = "stop"
    """What then: end the run, or go on with weights and optimizer of the last checkpoint before the first of them."""
    critic_warmup_steps: int = 0
    """First iterations in which only the critic learns; they count in the policy's learning-rate schedule too."""

    def __post_init__(self) -> None:
        require_positive("ppo", self, "num_epochs", "num_minibatches", "max_tokens_per_microbatch", "kl_horizon")
        require_positive("ppo", self, "old_kl_coef", "old_kl_target", "kl_target", "target_kl", "value_clip")
        require_positive("ppo", self, "clip_scores", "loss_divisor", "importance_cap")
        require_unit("ppo", self, "gamma", "lam")
        require(0 <= self.clip_low < 1, f"ppo.clip_low must be in [0, 1), got {self.clip_low}")
        require(self.clip_high >= 0, f"ppo.clip_high must be >= 0, got {self.clip_high}")
        for name in ("value_coef", "entropy_coef", "kl_coef", "critic_warmup_steps", "max_skipped_steps"):
            require(0 <= getattr(self, name) < math.inf, f"ppo.{name} must be >= 0, got {getattr(self, name)}")
        dual = self.dual_clip is None or 1 < self.dual_clip < math.inf
        require(dual, f"ppo.dual_clip must be > 1 and finite, got {self.dual_clip}")
        finite = math.isfinite(self.missing_eos_score)
        require(finite, f"ppo.missing_eos_score must be finite, got {self.missing_eos_score}")
        require(
            self.objective == "clip" or self.num_epochs * self.num_minibatches > 1,
            "ppo.objective = 'kl-penalty' adapts to how far the update moved, which takes at least two steps: raise "
            "ppo.num_epochs or ppo.num_minibatches",
        )
        require(
            self.kl_target is None or self.kl_coef > 0, "ppo.kl_target multiplies ppo.kl_coef, which must be > 0, got 0"
        )
        require(
            self.target_kl is None or self.num_epochs * self.num_minibatches > 1,
            "ppo.target_kl is measured before every step but the first, so it needs at least two: raise ppo.num_epochs "
            "or ppo.num_minibatches",
        )
        require(
            self.critic_warmup_steps == 0 or self.advantage == "gae",
            f"ppo.critic_warmup_steps needs a critic (ppo.advantage = 'gae'), got {self.advantage!r}",
        )
        require(
            self.loss_divisor is None or self.aggregation == "constant",
            f"ppo.loss_divisor only acts with ppo.aggregation = 'constant', got {self.aggregation!r}",
        )
        require(
            self.gamma == 1 or self.advantage in ("gae", "reinforce++"),
            f"ppo.gamma only acts with ppo.advantage 'gae' and 'reinforce++', got {self.advantage!r}",
        )
        require(not self.roll_back or self.target_kl is not None, "ppo.roll_back needs ppo.target_kl, got None")
        require(
            self.kl_in == "loss" or not self.kl_estimator.endswith("+"),
            f"ppo.kl_estimator {self.kl_estimator!r} only differs in its gradient, so it needs ppo.kl_in = 'loss'; "
            f"in the reward use {self.kl_estimator[:-1]!r}",
        )
        require(
            self.truncation != "bootstrap" or self.advantage == "gae",
            f"ppo.truncation = 'bootstrap' needs a critic (ppo.advantage = 'gae'), got {self.advantage!r}",
        )
