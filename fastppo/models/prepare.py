"""Packed attention on, dropout off, and the checks that packing and head are what fastppo takes them for."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastppo.attention import PACKED, dense_attention, plan
from fastppo.checks import require
from fastppo.config import LayersConfig
from fastppo.microbatch import MicroBatch
from fastppo.models.activations import keep_activations
from fastppo.models.heads import hidden_states, lm_head
from fastppo_kernels import linear

PLAIN = LayersConfig()
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}  # what `attention.py` computes


class Linear(nn.Linear):
    """nn.Linear by fastppo's product, which is the faster one on CPUs."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def prepare(model: PreTrainedModel, layers: LayersConfig = PLAIN) -> PreTrainedModel:
    """Any decoder, ready for packed forwards.

    Raises:
        ValueError: its sequences cannot be packed.
    """
    _check_packing(set_up(model, layers))
    return model


def set_up(
    model: PreTrainedModel, layers: LayersConfig = PLAIN, *, on_cpu: bool = not torch.cuda.is_available()
) -> PreTrainedModel:
    """`prepare` without a forward pass, for a device with or without CUDA."""
    require(
        model._can_set_attn_implementation(),
        f"{type(model).__name__} does not use transformers' attention interface, so sequences cannot be packed",
    )
    others = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - ATTENTION_LAYERS
    require(
        not model._is_stateful and not others,
        f"{type(model).__name__} has layers ({', '.join(sorted(others)) or 'with a state'}) other than full and "
        "sliding-window attention: packed sequences would leak into each other there",
    )
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = {str(x.get("rope_type")) for x in (rope, *rope.values()) if isinstance(x, dict)} & {"dynamic", "longrope"}
    require(
        not kinds,
        f"{type(model).__name__} has rotary positions of type {', '.join(sorted(kinds))!r}, whose frequencies follow "
        "the longest sequence of a pack: a token's log-prob would depend on its neighbours. Use a model or a config "
        "with rope_type 'default', 'linear', 'llama3' or 'yarn'",
    )
    model.set_attn_implementation(PACKED)
    keep_activations(model, layers)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # there is no padding: a pad token that is also EOS learns like any other
        if type(module) is nn.Linear and on_cpu:
            module.__class__ = Linear
    return without_dropout(model).train()  # checkpointing is only active in train mode; there is no dropout


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """The ratio of a policy to itself is 1 only without dropout (N+ details, policy 4)."""
    remember_dropout(model, {name: getattr(model.config, name) for name in dropout_keys(model.config)})
    for name in dropout_keys(model.config):
        setattr(model.config, name, 0.0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in [k for k, v in vars(module).items() if "dropout" in k and isinstance(v, float)]:
            setattr(module, name, 0.0)  # read from the config when the module was made
    return model


def remember_dropout(model: PreTrainedModel, rates: Mapping[str, float]) -> None:
    """What the config said before it was switched off; `models.save` writes it back."""
    known: dict[str, float] = getattr(model, "dropout_rates", {})
    model.dropout_rates = {**known, **{name: rate for name, rate in rates.items() if rate}}  # pyright: ignore


def dropout_keys(config: Any) -> list[str]:
    return [k for k, v in vars(config).items() if ("dropout" in k or k.endswith("pdrop")) and isinstance(v, float)]


def _packed(model: PreTrainedModel, *sequences: range) -> MicroBatch:
    """Sequences of token ids, for a forward pass."""
    lengths = [len(ids) for ids in sequences]
    ids = torch.tensor([i for ids in sequences for i in ids], device=model.device)
    position_ids = torch.cat([torch.arange(n, device=model.device) for n in lengths])
    return MicroBatch(ids, position_ids, plan(lengths, model.device, recurring=True), ids, ids, ids, ids)


@torch.no_grad()
def _check_packing(model: PreTrainedModel) -> None:
    """A token whose hidden state hears of the sequence before its own would be trained on noise, without a word."""
    size = model.config.get_text_config().vocab_size
    before, after = range(min(6, size)), range(max(0, size - 6), size)
    together = hidden_states(model, _packed(model, before, after))[len(before) :].float()
    alone = hidden_states(model, _packed(model, after)).float()
    tolerance = (1e-3 if model.dtype == torch.float32 else 0.1) * (1 + alone.abs().max())
    gap = (together - alone).abs().max()
    require(bool(gap <= tolerance), f"{type(model).__name__} does not keep packed sequences apart (gap {gap:.3g})")


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Some architectures scale logits in ways of their own; to train on other logits than the model's is an error."""
    head = lm_head(model)
    batch = _packed(model, range(min(8, head.weight.shape[0])))
    ids = batch.input_ids
    ours = nn.functional.linear(hidden_states(model, batch), head.weight, head.bias).float()
    ours = ours if head.softcap is None else head.softcap * torch.tanh(ours / head.softcap)
    with dense_attention(model):
        theirs = model(input_ids=ids[None], use_cache=False).logits[0].float()
    tolerance = (1e-3 if model.dtype == torch.float32 else 0.1) * (1 + theirs.abs().max())
    gap = (ours - theirs).abs().max()
    require(
        bool(gap <= tolerance),
        f"{type(model).__name__} turns hidden states into logits in a way fastppo does not know (gap {gap:.3g}): "
        "only a linear head with an optional final_logit_softcapping can be trained",
    )


def frozen(model: PreTrainedModel) -> PreTrainedModel:
    """In eval mode and without gradients."""
    return model.eval().requires_grad_(False)


def to_device(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model, moved."""
    return model.to(device)  # pyright: ignore[reportArgumentType]  transformers' decorator hides the signature
