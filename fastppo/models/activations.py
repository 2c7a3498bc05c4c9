"""What a layer keeps for its backward pass: all it made, its matrix products and attention, or its input alone."""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from fastppo.checks import require
from fastppo.config import LayersConfig

KEPT = frozenset(  # operators whose output costs far more to make than to keep
    {
        *("aten::mm", "aten::addmm", "fastppo::product"),
        *(f"aten::_scaled_dot_product_{kind}_attention" for kind in ("flash", "efficient", "cudnn")),
        *("aten::_scaled_dot_product_flash_attention_for_cpu", "flash_attn::_flash_attn_varlen_forward"),
        *("torch_attn::_varlen_attn", "fastppo::packed_attention"),
        "fastppo_outline::attention",  # the memory planner's
    }
)


def keep_activations(model: PreTrainedModel, config: LayersConfig) -> None:
    """Compute again in the backward pass what `config` does not keep, in every `checkpoint_every`-th layer.

    The same operators on the same inputs: gradients are bit for bit those of keeping everything. Only a layer that
    would else run whole in C++ (`native_decoder`) adds gradients up in another order than its modules.
    """
    if config.checkpointing == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if config.checkpointing == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    new = "activation_checkpointing_enable"
    enable: Any = getattr(model, new if hasattr(model, new) else "gradient_checkpointing_enable")  # its old name
    enable(options, every_n_layers=config.checkpoint_every, offload=config.offload_activations)


def require_a_gpu(config: LayersConfig, device: torch.device) -> None:
    """
    Raises:
        ValueError: something is to be moved off a GPU, and there is none.
    """
    require(
        device.type == "cuda" or not config.offload_activations,
        "layers.offload_activations moves what a GPU does not hold to the host, and this run's models are on "
        f"{device.type!r} already: set it to false",
    )


def _policy(_: SelectiveCheckpointContext, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operator.name() in KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
