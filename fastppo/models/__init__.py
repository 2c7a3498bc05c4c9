"""The models: load, call, save. The only package that names transformers' model classes.

All roles are ordinary transformers models with packed attention and dropout off, saved so that the AutoModel classes
load them: the policy as a causal LM, the critic as a token classifier with one label (the value of each state).
"""

from fastppo.models.activations import require_a_gpu
from fastppo.models.adapter_files import is_saved_at as is_saved_adapter
from fastppo.models.facts import (
    context_length,
    context_of,
    eos_token_ids,
    kv_bytes_per_token,
    kv_shape,
    require_context,
)
from fastppo.models.files import has_tokenizer, load_tokenizer, read_config, save
from fastppo.models.fused import fuse_layers, require_fused
from fastppo.models.heads import LMHead, classify, hidden_states, is_decoder, lm_head, value_head, values
from fastppo.models.lora import adapt, bare, is_adapted, plain_weights, require_peft
from fastppo.models.native_decoder import NativeLayer, native_layers_of
from fastppo.models.outline import outline
from fastppo.models.prepare import frozen, prepare, to_device
from fastppo.models.roles import (
    critic_from,
    load_critic,
    load_policy,
    load_reference,
    load_reward_model,
    new_causal_lm,
    prepare_policy,
    reference_of,
    reward_model_from,
)

__all__ = [
    "LMHead",
    "NativeLayer",
    "adapt",
    "bare",
    "classify",
    "context_length",
    "context_of",
    "critic_from",
    "eos_token_ids",
    "frozen",
    "fuse_layers",
    "has_tokenizer",
    "hidden_states",
    "is_adapted",
    "is_decoder",
    "is_saved_adapter",
    "kv_bytes_per_token",
    "kv_shape",
    "native_layers_of",
    "lm_head",
    "load_critic",
    "load_policy",
    "load_reference",
    "load_reward_model",
    "load_tokenizer",
    "new_causal_lm",
    "outline",
    "plain_weights",
    "prepare",
    "prepare_policy",
    "reference_of",
    "read_config",
    "require_a_gpu",
    "require_context",
    "require_fused",
    "require_peft",
    "reward_model_from",
    "save",
    "to_device",
    "value_head",
    "values",
]
