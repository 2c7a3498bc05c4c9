"""Rollout engines, one file each."""

from fastppo.rollout.embedded import EmbeddedEngine

__all__ = ["EmbeddedEngine"]
