"""TL;DR prompts for `tldr.toml`, through the `datasets` library (pip install datasets)."""

from collections.abc import Iterator
from typing import Any

DATASET = "vwxyzjn/summarize_from_feedback_tldr_3_filtered_oai_preprocessing_1706381144"


def prompts() -> Iterator[dict[str, Any]]:
    """Training queries: a Reddit post, already ending in "TL;DR:"."""
    yield from _split("train")


def held_out() -> Iterator[dict[str, Any]]:
    """Validation queries."""
    yield from _split("validation")


def _split(name: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset  # pyright: ignore[reportMissingImports]

    for row in load_dataset(DATASET, split=name):
        yield {"prompt": row["query"], "reference": row["reference_response"]}
