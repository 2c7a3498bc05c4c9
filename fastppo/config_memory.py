"""How the roles share memory."""

from dataclasses import dataclass
from typing import Literal

from fastppo.checks import require, require_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConfig:
    """Whether the roles are models of their own, or adapters on one frozen base (LoRA, arXiv:2106.09685)."""

    share: Literal["none", "lora"] = "none"
    """`lora`: policy and critic are float32 adapters on one frozen base, the reference is that base; needs peft."""
    lora_rank: int = 16
    """Rows of A and columns of B in the weight's change B A * lora_alpha / lora_rank."""
    lora_alpha: float = 32.0
    """Scale of that change."""
    lora_targets: tuple[str, ...] = ("all-linear",)
    """Layers that get an adapter, by the end of their names (`q_proj`); `all-linear`: every one but the heads."""

    def __post_init__(self) -> None:
        require_positive("memory", self, "lora_rank", "lora_alpha")
        require(len(self.lora_targets) > 0, "memory.lora_targets is empty: name layers, or 'all-linear'")
        require(
            self.lora_targets == ("all-linear",) or "all-linear" not in self.lora_targets,
            f"memory.lora_targets is 'all-linear' or names, got both: {list(self.lora_targets)}",
        )
