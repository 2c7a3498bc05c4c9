"""Model shapes: a folder each with transformers' config.json, for random weights and for `fastppo plan`."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from fastppo.checks import require

FOLDER = Path(__file__).parent
SHAPES = tuple(sorted(path.parent.name for path in FOLDER.glob("*/config.json")))
NO_SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def config_of(shape: str, **changes: Any) -> PreTrainedConfig:
    """The config of a shape, without an end-of-sequence token; `changes` replace keys of it.

    Raises:
        ValueError: there is no such shape.
    """
    require(shape in SHAPES, f"no shape {shape!r}: there are {', '.join(SHAPES)}")
    keys = {**json.loads((FOLDER / shape / "config.json").read_text(encoding="utf-8")), **NO_SPECIAL_TOKENS, **changes}
    return AutoConfig.for_model(**keys)


def num_parameters(config: PreTrainedConfig) -> int:
    """Of a causal LM of one of these shapes (Llama or Qwen2), a tied head counted once."""
    c: Any = config
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    queries, keys = c.num_attention_heads * width, c.num_key_value_heads * width
    biases = queries + 2 * keys if c.model_type == "qwen2" else 0
    attention = c.hidden_size * (2 * queries + 2 * keys) + biases
    layer = attention + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
    embeddings = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
    return c.num_hidden_layers * layer + c.hidden_size + embeddings
