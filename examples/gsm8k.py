"""GSM8K for `gsm8k.toml`: the prompts of the public JSONL files and the reward."""

import re

from fastppo import Sample


def score(samples: list[Sample]) -> list[float]:
    """1 where the number after #### is the right one, else 0."""
    return [float(_answer(s.response) == _answer(str(s.record["answer"]))) for s in samples]


def _answer(text: str) -> str | None:
    found = re.findall(r"#### (-?[0-9.,]+)", text)
    return found[-1].replace(",", "").rstrip(".") if found else None
