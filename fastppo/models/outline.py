"""Models made from a config alone: for memory plans, under a mode in which tensors have shapes and no memory."""

import copy
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from fastppo.config import LayersConfig
from fastppo.models.heads import is_decoder, value_head
from fastppo.models.prepare import PLAIN, set_up
from fastppo.models.roles import critic_class

Kind = Literal["policy", "critic", "reward"]


def outline(
    config: PreTrainedConfig, kind: Kind, dtype: str, *, layers: LayersConfig = PLAIN, on_cpu: bool = True
) -> PreTrainedModel:
    """The model that `load_policy`, `critic_from` or `load_reward_model` would give, with weights nobody has set."""
    config = copy.deepcopy(config)
    if kind == "critic":
        config.num_labels = 1
    model = _class(config, kind).from_config(config, dtype=getattr(torch, dtype))
    if kind == "critic":
        value_head(model).float()
    return set_up(model, layers, on_cpu=on_cpu) if kind != "reward" or is_decoder(model) else model


def _class(config: PreTrainedConfig, kind: Kind) -> Any:
    if kind == "policy":
        return AutoModelForCausalLM
    return critic_class(config) if kind == "critic" else AutoModelForSequenceClassification
