"""The optimizer of a role, and in what form it keeps weights and moments."""

import math
from dataclasses import dataclass
from typing import Literal

from fastppo.checks import require, require_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW and its schedule, one for the policy and one for the critic."""

    lr: float = 3e-6
    """Learning rate of AdamW, before warm-up and schedule."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Stepped once per PPO iteration; linear and cosine end at 0 after the last one."""
    warmup_steps: int = 0
    """Iterations over which the rate rises; the first one already learns."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's first and second moments."""
    eps: float = 1e-5
    """Added to the root of AdamW's second moment."""
    weight_decay: float = 0.0
    """Decoupled: weights shrink by lr * weight_decay per step."""
    max_grad_norm: float | None = 1.0
    """Global norm the gradient is clipped to, after accumulation. N+ does not clip: None."""
    kind: Literal["adamw", "adamw-8bit", "adamw-4bit", "adamw-cpu-offload"] = "adamw"
    """Where the two moments live: in float32; in 8 or 4 bits with a scale per block (torchao); or in float32 in host
    memory together with float32 weights, stepped by the CPU."""
    masters: Literal["float32", "stochastic"] = "float32"
    """What bfloat16 weights keep of steps below their rounding: a float32 copy, or on average all of it, by rounding
    up or down at random. Of no effect on float32 weights."""

    def __post_init__(self) -> None:
        require(self.lr >= 0 and math.isfinite(self.lr), f"optimizer lr must be finite and >= 0, got {self.lr}")
        require_positive("optimizer", self, "eps", "max_grad_norm")
        decays = 0 <= self.weight_decay < math.inf
        require(decays, f"optimizer weight_decay must be finite and >= 0, got {self.weight_decay}")
        require(self.warmup_steps >= 0, f"optimizer warmup_steps must be >= 0, got {self.warmup_steps}")
        require(all(0 <= b < 1 for b in self.betas), f"optimizer betas must be in [0, 1), got {self.betas}")
        require(
            self.kind != "adamw-cpu-offload" or self.masters == "float32",
            "optimizer kind 'adamw-cpu-offload' keeps float32 weights in host memory: masters must be 'float32'",
        )
