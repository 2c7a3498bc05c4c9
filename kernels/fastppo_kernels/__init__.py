"""The ops of PPO for language models, on packed tokens; `fastppo_kernels.reference` defines each in plain PyTorch.

Depends on torch alone: never on fastppo or transformers.
"""

from fastppo_kernels.decode import decode_attention
from fastppo_kernels.gae import gae, token_rewards
from fastppo_kernels.linear import linear
from fastppo_kernels.logprobs import logits_token_logprobs, token_logprobs
from fastppo_kernels.packed import packed_attention
from fastppo_kernels.ppo import linear_ppo_loss, logits_ppo_loss, ppo_loss
from fastppo_kernels.sample import sample
from fastppo_kernels.stats import merge_stats
from fastppo_kernels.value import linear_value_loss, value_loss
from fastppo_kernels.whiten import whiten

__all__ = [
    "decode_attention",
    "gae",
    "linear",
    "linear_ppo_loss",
    "linear_value_loss",
    "logits_ppo_loss",
    "logits_token_logprobs",
    "merge_stats",
    "packed_attention",
    "ppo_loss",
    "sample",
    "token_logprobs",
    "token_rewards",
    "value_loss",
    "whiten",
]
