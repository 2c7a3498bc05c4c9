"""What a model's forward pass gives: hidden states, and the heads that turn them into logits and values."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from fastppo.attention import padded
from fastppo.checks import require
from fastppo.microbatch import MicroBatch

HEADS = ("score", "classifier")  # names that transformers gives a classification head


@dataclass(frozen=True)
class LMHead:
    """What turns hidden states into logits: softcap * tanh((h @ weight.T + bias) / softcap)."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    softcap: float | None


def hidden_states(model: PreTrainedModel, batch: MicroBatch) -> Tensor:
    """Packed forward of the body, without any head: (n, H)."""
    ids, positions = (padded(x, batch.packing)[None] for x in (batch.input_ids, batch.position_ids))
    out = model.base_model(input_ids=ids, position_ids=positions, use_cache=False, packing=batch.packing)
    return out.last_hidden_state[0, : len(batch.input_ids)]


def lm_head(model: PreTrainedModel) -> LMHead:
    """The live LM head (weights are not copied)."""
    head: Any = model.get_output_embeddings()
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return LMHead(head.weight, getattr(head, "bias", None), softcap)


def value_head(model: PreTrainedModel) -> nn.Linear:
    """The classification head of a critic or reward model."""
    name = head_name(model)
    require(name is not None, f"{type(model).__name__} has no linear head named {' or '.join(HEADS)}")
    return getattr(model, str(name))


def head_name(model: PreTrainedModel) -> str | None:
    """The name of its classification head; None where it has none."""
    return next((name for name in HEADS if isinstance(getattr(model, name, None), nn.Linear)), None)


def classify(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The classification head on hidden states (n, H): float32 (n, labels), whatever dtype either has."""
    head = value_head(model)
    return nn.functional.linear(hidden.float(), head.weight.float(), None if head.bias is None else head.bias.float())


def values(critic: PreTrainedModel, batch: MicroBatch) -> Tensor:
    """Value of the state after each token, float32 (n,)."""
    return classify(critic, hidden_states(critic, batch)).squeeze(-1)


def is_decoder(model: PreTrainedModel) -> bool:
    """Whether a classifier reads left to right and scores its last token (a `score` head), as LLM reward models do."""
    return isinstance(getattr(model, "score", None), nn.Linear)
