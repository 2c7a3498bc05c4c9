"""PPO for language models: `PPOEngine.generate / score / update`, or `train(config)` for a whole run.

The names are imported when they are first used: the command then answers, and takes Ctrl-C, before torch is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastppo.batch import Experience, Prompts, Rollout, Sample, Sampling
    from fastppo.config import (
        CriticConfig,
        DataConfig,
        LayersConfig,
        MemoryConfig,
        ModelConfig,
        OptimizerConfig,
        PPOConfig,
        RewardConfig,
        RolloutConfig,
        RunConfig,
        TrainConfig,
        WatchConfig,
    )
    from fastppo.engine import PPOEngine
    from fastppo.reward_model import RewardModel
    from fastppo.rewards import FunctionReward, HTTPReward, RewardError, Scores, WeightedRewards
    from fastppo.run_file import load_config
    from fastppo.trainer import train

__version__ = "0.1.0"
__all__ = [
    "CriticConfig",
    "DataConfig",
    "Experience",
    "FunctionReward",
    "HTTPReward",
    "LayersConfig",
    "MemoryConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PPOConfig",
    "PPOEngine",
    "Prompts",
    "RewardConfig",
    "RewardError",
    "RewardModel",
    "Rollout",
    "RolloutConfig",
    "RunConfig",
    "Sample",
    "Sampling",
    "Scores",
    "TrainConfig",
    "WatchConfig",
    "WeightedRewards",
    "load_config",
    "train",
]
# in which they are looked up, in order
_MODULES = ("config", "batch", "rewards", "reward_model", "run_file", "engine", "trainer")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in map(import_module, (f"fastppo.{m}" for m in _MODULES)):
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module 'fastppo' has no attribute {name!r}")
