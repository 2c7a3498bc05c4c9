"""Tiny models of real architectures, made from config: what the tests train."""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from fastppo import LayersConfig, models

VOCAB = 48
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_SHAPE),
    "qwen2": lambda: Qwen2Config(**_SHAPE, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_SHAPE, head_dim=8),
    "gemma2": lambda: Gemma2Config(
        **_SHAPE, head_dim=8, sliding_window=4, attn_logit_softcapping=5.0, final_logit_softcapping=3.0
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=None, eos_token_id=None
    ),
}
ARCHITECTURES = tuple(CONFIGS)
LAYERS = {False: LayersConfig(), True: LayersConfig(checkpointing="full")}  # by whether they are computed again


def raw_lm(architecture: str = "llama", *, seed: int = 0, scale: float = 5.0) -> PreTrainedModel:
    """A causal LM as transformers makes it; `scale` widens the weights, so that it is far from uniform."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture]())
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(scale)
    return model


def policy(architecture: str = "llama", *, seed: int = 0, scale: float = 5.0, **kwargs: Any) -> PreTrainedModel:
    """The same, ready for packed training."""
    return models.prepare_policy(raw_lm(architecture, seed=seed, scale=scale), **kwargs)
