"""What a model's config says: context, end of sequence, size of its keys and values."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fastppo.batch import Prompts
from fastppo.checks import require


def context_length(model: PreTrainedModel) -> int:
    """Tokens the model can read; a very large number when its config sets no limit."""
    return context_of(model.config)


def context_of(config: PreTrainedConfig) -> int:
    """The same from the config alone."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 62


def require_context(model: PreTrainedModel, prompts: Prompts, limits: Sequence[int]) -> int:
    """The tokens of the longest prompt with `limits`, its most new ones.

    Raises:
        ValueError: it is longer than the model can read.
    """
    pairs = ((len(ids), limit) for ids, limit in zip(prompts.token_ids, limits, strict=True))
    length, limit = max(pairs, key=lambda pair: sum(pair))
    context = context_length(model)
    require(
        length + limit <= context,
        f"a prompt of {length} tokens plus max_new_tokens = {limit} exceeds the model's "
        f"context of {context}: shorten the prompts or lower max_new_tokens",
    )
    return length + limit


def kv_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of the keys and values of one token in all layers."""
    layers, heads, size = kv_shape(model)
    return 2 * layers * heads * size * model.dtype.itemsize


def kv_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """Layers, heads of keys and values, and their size."""
    config: Any = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, heads, size


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """Every end-of-sequence token: of the generation config, the model config and the tokenizer."""
    sources = (
        getattr(model.generation_config, "eos_token_id", None),
        getattr(model.config.get_text_config(), "eos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    )
    ids: list[int] = []
    for source in sources:
        ids += source if isinstance(source, list) else [] if source is None else [source]
    return tuple(dict.fromkeys(ids))
