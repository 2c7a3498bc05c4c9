"""The four roles: policy, reference, reward, critic, from a checkpoint or from each other."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from fastppo.checks import require
from fastppo.config import LayersConfig, ModelConfig
from fastppo.models import adapter_files, lora
from fastppo.models.files import load, read, read_config, refuse_damaged
from fastppo.models.heads import HEADS, head_name, is_decoder, lm_head, value_head
from fastppo.models.prepare import PLAIN, check_head, frozen, prepare, remember_dropout, to_device, without_dropout


def load_policy(config: ModelConfig, layers: LayersConfig = PLAIN) -> PreTrainedModel:
    """Any causal LM checkpoint, ready for packed forwards.

    Raises:
        ValueError: the checkpoint is missing, damaged, incomplete, or its logits are not a plain LM head's.
    """
    model = load(AutoModelForCausalLM, config.path, config.dtype, trust_remote_code=config.trust_remote_code)
    return prepare_policy(model, layers=layers)


def prepare_policy(model: PreTrainedModel, *, layers: LayersConfig = PLAIN) -> PreTrainedModel:
    """Switch packed attention on and check that hidden states and LM head reproduce the model's own logits.

    A `peft.PeftModel` with one LoRA adapter becomes the transformers model inside it: only the adapter then trains.
    """
    model = prepare(lora.unwrapped(model), layers)
    check_head(model)
    return model


def new_causal_lm(config: PreTrainedConfig, dtype: str = "float32") -> PreTrainedModel:
    """A causal LM with random weights."""
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))


def load_reference(config: ModelConfig, policy: PreTrainedModel) -> PreTrainedModel:
    """The frozen model that KL is measured against: the policy as it is now, or the checkpoint the config names."""
    if config.reference is None:
        return reference_of(policy)
    reference = load(AutoModelForCausalLM, config.reference, config.dtype, trust_remote_code=config.trust_remote_code)
    reference = to_device(prepare_policy(reference), policy.device)
    require(
        lm_head(reference).weight.shape[0] == lm_head(policy).weight.shape[0],
        f"reference and policy must share a vocabulary, got {lm_head(reference).weight.shape[0]} and "
        f"{lm_head(policy).weight.shape[0]} entries",
    )
    return frozen(reference)


def reference_of(policy: PreTrainedModel) -> PreTrainedModel:
    """A frozen copy of the policy as it is now; of one with adapters, a copy of what its base does not say."""
    return frozen(lora.reference_of(policy) if lora.is_adapted(policy) else copy.deepcopy(policy))


def load_reward_model(
    path: str, dtype: str = "float32", *, trust_remote_code: bool = False, base: PreTrainedModel | None = None
) -> PreTrainedModel:
    """Any sequence-classification checkpoint, frozen. Decoders get packed attention, encoders keep their own.

    A folder with adapters and a head, in peft's format, goes on the tensors of `base`, a model with adapters too.
    """
    if adapter_files.is_saved_at(path):
        return frozen(_load_reward_adapter(path, base))
    model = load(AutoModelForSequenceClassification, path, dtype, trust_remote_code=trust_remote_code)
    return frozen(prepare(model) if is_decoder(model) else without_dropout(model))


def load_critic(
    path: str, dtype: str = "float32", *, layers: LayersConfig = PLAIN, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A critic saved by fastppo (its value head comes back), or the body of any LM or reward model with a zero head."""
    config = read_config(path, trust_remote_code)
    cls = critic_class(config)
    saved = any(name.endswith(cls.__name__.removeprefix("AutoModel")) for name in config.architectures or [])
    with _float32_heads(cls._model_mapping[type(config)]):
        model, info = read(cls, path, dtype, trust_remote_code=trust_remote_code, num_labels=1)
    refuse_damaged(path, model, info, () if saved else HEADS)
    if not saved:
        _zero(value_head(model))
    return prepare(model, layers)


def critic_from(model: PreTrainedModel, *, label: int | None = None, layers: LayersConfig = PLAIN) -> PreTrainedModel:
    """A critic with the body of `model` (a policy, or a reward model with `label` naming the logit to start from).

    The value head is float32: zero for a policy (V = 0 before the first update), the reward head for a reward model.
    On a policy with adapters the critic is fresh adapters of its own on the same base.
    """
    if lora.is_adapted(model):
        require(label is None, "a critic on the base of adapters starts from a value head of zero, not from a reward's")
        critic = prepare(_around_body_of(model, critic_class(model.config)), layers)
        critic = lora.adapt_like(critic, model, seed=1)
        _zero(value_head(critic)).requires_grad_(True)
        return critic
    critic = _with_body_of(model, critic_class(model.config))
    head = _zero(value_head(critic).float())
    if label is not None:
        with torch.no_grad():
            source = value_head(model)
            head.weight.copy_(source.weight[label])
            if head.bias is not None and source.bias is not None:
                head.bias.copy_(source.bias[label])
    return prepare(critic, layers)


def reward_model_from(model: PreTrainedModel) -> PreTrainedModel:
    """A reward model to be trained: the body of a policy, a new head N(0, 1 / sqrt(H + 1)) (N+ details, reward 2)."""
    reward = _with_body_of(model, AutoModelForSequenceClassification)
    head = value_head(reward).float()
    nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
    return prepare(reward)


def critic_class(config: PreTrainedConfig) -> Any:
    """A value per token is token classification with one label.

    Where transformers has no such class for an architecture, its sequence classifier holds the same body and head.
    """
    if type(config) in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING:
        return AutoModelForTokenClassification
    require(
        type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        f"transformers has no classifier for {config.model_type!r}, so it cannot be a critic: name another "
        "checkpoint in critic.init, or use a critic-free ppo.advantage",
    )
    return AutoModelForSequenceClassification


def _with_body_of(model: PreTrainedModel, cls: Any) -> PreTrainedModel:
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    other = cls.from_config(config, dtype=model.dtype).to(model.device)
    getattr(other, other.base_model_prefix).load_state_dict(model.base_model.state_dict())
    remember_dropout(other, getattr(model, "dropout_rates", {}))
    return other


@contextmanager
def _float32_heads(cls: type[PreTrainedModel]) -> Iterator[None]:
    """Within it, checkpoints of `cls` are loaded with a float32 head, whatever the dtype of the body: to load all of it
    in float32 and round the body afterwards would take twice the memory of a bfloat16 checkpoint."""
    name = "_keep_in_fp32_modules_strict"
    before, own = getattr(cls, name), name in vars(cls)
    setattr(cls, name, {*(before or ()), *HEADS})
    try:
        yield
    finally:
        setattr(cls, name, before) if own else delattr(cls, name)


def _load_reward_adapter(path: str, base: PreTrainedModel | None) -> PreTrainedModel:
    require(
        base is not None and lora.is_adapted(base),
        f"the reward model at {path!r} is an adapter, which needs a base: set memory.share = 'lora' where it is the "
        "policy's, or merge it into its own with peft's merge_and_unload",
    )
    assert base is not None
    adapter_files.require_base(path, str(base.name_or_path))
    reward = _around_body_of(base, AutoModelForSequenceClassification, adapter_files.num_labels_at(path, HEADS))
    reward = prepare(reward)
    return adapter_files.load_adapter(reward, str(head_name(reward)), path)


def _around_body_of(model: PreTrainedModel, cls: Any, num_labels: int = 1) -> PreTrainedModel:
    """Another head, float32 and not initialised, on the base of a model with adapters: no tensor of it is copied."""
    config = copy.deepcopy(model.config)
    config.num_labels = num_labels
    with torch.device("meta"):
        other: Any = cls.from_config(config, dtype=model.dtype)
    body: Any = lora.bare(model).base_model
    setattr(other, other.base_model_prefix, body)
    for module in other.modules():  # the copy of a body that recomputes its layers would go on doing so
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    value_head(other).float().to_empty(device=model.device)
    return other


@torch.no_grad()
def _zero(head: nn.Linear) -> nn.Linear:
    head.weight.zero_()
    if head.bias is not None:
        head.bias.zero_()
    return head
