"""How the layers of the models that learn are computed."""

from dataclasses import dataclass
from typing import Literal

from fastppo.checks import require, require_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class LayersConfig:
    """What a layer of policy and critic keeps for its backward pass, and which kernels compute it."""

    checkpointing: Literal["none", "selective", "full"] = "none"
    """What is computed a second time in the backward pass: nothing; norms, rotary positions and activation functions,
    while outputs of matrix products and of attention are kept; or all of a layer, about a third more compute."""
    checkpoint_every: int = 1
    """Only every n-th layer, from the first one on, is computed again."""
    offload_activations: bool = False
    """The inputs of layers that are computed again wait in pinned host memory; for a GPU."""
    fused: Literal["none", "native", "liger", "compile"] = "none"
    """Kernels of norms, rotary positions and activation functions, of the reference too: PyTorch's own, fastppo's in
    C++ (float32, on a CPU; whole layers, and sampling's steps through all of them, where their parts are known),
    Liger's (liger-kernel, on a GPU), or those that torch.compile makes of each layer."""

    def __post_init__(self) -> None:
        require_positive("layers", self, "checkpoint_every")
        recomputes = self.checkpointing != "none"
        require(
            recomputes or (self.checkpoint_every == 1 and not self.offload_activations),
            "layers.checkpoint_every and layers.offload_activations are about layers that are computed again: set "
            "layers.checkpointing to 'full' or 'selective'",
        )
        require(
            self.checkpointing != "selective" or self.fused in ("none", "native"),
            f"layers.fused = {self.fused!r} does not go with layers.checkpointing = 'selective': Liger writes over the "
            "products that are kept, and compiled layers choose by themselves. Use 'full' or 'none'",
        )
