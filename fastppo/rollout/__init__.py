"""Rollout engines, one file each."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from fastppo.config import RolloutConfig
from fastppo.protocols import RolloutEngine
from fastppo.rollout.embedded import EmbeddedEngine
from fastppo.rollout.generate_batch import GenerateBatchEngine
from fastppo.rollout.vllm import VLLMEngine

__all__ = ["EmbeddedEngine", "GenerateBatchEngine", "VLLMEngine", "make_engine"]


def make_engine(
    policy: PreTrainedModel, config: RolloutConfig, *, eos_token_ids: Sequence[int], seed: int
) -> RolloutEngine:
    """The engine that a run file names."""
    if config.engine == "vllm":
        return VLLMEngine(policy, eos_token_ids=eos_token_ids, config=config.vllm, max_rows=config.max_rows, seed=seed)
    sizes: dict[str, Any] = {
        "max_rows": config.max_rows,
        "kv_bytes": None if config.kv_gib is None else int(config.kv_gib * 2**30),
    }
    if config.engine == "generate_batch":
        return GenerateBatchEngine(policy, eos_token_ids=eos_token_ids, seed=seed, **sizes)
    return EmbeddedEngine(
        policy, eos_token_ids=eos_token_ids, seed=seed, cuda_graphs=config.cuda_graphs, keep_memory=config.keep_memory,
        **sizes,
    )  # fmt: skip
