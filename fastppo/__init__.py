"""PPO for language models: `PPOEngine.generate / score / update`, or `train(config)` for a whole run."""

from fastppo.batch import Experience, Prompts, Rollout, Sample, Sampling
from fastppo.config import (
    CriticConfig,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from fastppo.engine import PPOEngine
from fastppo.rewards import FunctionReward, HTTPReward, RewardError, RewardModel, Scores, WeightedRewards
from fastppo.run_file import load_config
from fastppo.trainer import train

__version__ = "0.1.0"
__all__ = [
    "CriticConfig",
    "DataConfig",
    "Experience",
    "FunctionReward",
    "HTTPReward",
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
    "WeightedRewards",
    "load_config",
    "train",
]
