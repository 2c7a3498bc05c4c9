"""The operators of torch.library behind the public functions: each with a fake for tracing and, where it has one, its
gradient, so they survive torch.compile. Arguments were checked by the public function; `backend` is a name.
"""

from fastppo_kernels.operators.common import looked_at
from fastppo_kernels.operators.decode import decode_attention
from fastppo_kernels.operators.logprobs import logits_token_logprobs, token_logprobs
from fastppo_kernels.operators.packed import PackedAttention
from fastppo_kernels.operators.ppo import linear_ppo, logits_ppo, logits_ppo_, ppo_tokens
from fastppo_kernels.operators.product import product
from fastppo_kernels.operators.sampling import sample
from fastppo_kernels.operators.scale import scale_, scaled
from fastppo_kernels.operators.sequences import gae, moments, token_rewards
from fastppo_kernels.operators.value import linear_value, value

__all__ = [
    "PackedAttention",
    "decode_attention",
    "gae",
    "linear_ppo",
    "linear_value",
    "logits_ppo",
    "logits_ppo_",
    "logits_token_logprobs",
    "looked_at",
    "moments",
    "ppo_tokens",
    "product",
    "sample",
    "scale_",
    "scaled",
    "token_logprobs",
    "token_rewards",
    "value",
]
