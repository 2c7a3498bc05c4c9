"""Rollout engines, one file each."""

from fastppo.rollout.embedded import EmbeddedEngine
from fastppo.rollout.generate_batch import GenerateBatchEngine

ENGINES = {"embedded": EmbeddedEngine, "generate_batch": GenerateBatchEngine}

__all__ = ["ENGINES", "EmbeddedEngine", "GenerateBatchEngine"]
