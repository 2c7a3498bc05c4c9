"""Model shapes of the step benchmark: transformers' configs as JSON, weights random, no end-of-sequence token."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from fastppo.checks import require

FOLDER = Path(__file__).parent
SHAPES = tuple(sorted(path.stem for path in FOLDER.glob("*.json")))
NO_SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def config_of(shape: str, **changes: Any) -> PreTrainedConfig:
    """The config of a shape, one that `fastppo bench step --shape` knows; `changes` replace keys of it.

    Raises:
        ValueError: there is no such shape.
    """
    require(shape in SHAPES, f"no shape {shape!r}: there are {', '.join(SHAPES)}")
    keys = {**json.loads((FOLDER / f"{shape}.json").read_text(encoding="utf-8")), **NO_SPECIAL_TOKENS, **changes}
    return AutoConfig.for_model(**keys)
