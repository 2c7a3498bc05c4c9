"""Inputs of the PPO losses that several test files share."""

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fastppo_kernels.reference import PPORows
from fastppo_kernels.reference import ppo_loss as reference_ppo_loss
from fastppo_kernels.reference import token_logprobs as reference_token_logprobs
from fastppo_kernels.settings import HeadSettings, PPOSettings
from numerics import DEVICE

SETTINGS = st.fixed_dictionaries(
    {
        "clip_low": st.sampled_from([0.2, 0.0, math.inf]),
        "clip_high": st.sampled_from([0.2, 0.28, math.inf]),
        "dual_clip": st.sampled_from([None, 1.5]),
        "kl_coef": st.sampled_from([0.0, 0.3]),
        "kl_estimator": st.sampled_from(["k1", "k2", "k3", "k1+", "k3+"]),
        "entropy_coef": st.sampled_from([0.0, 0.1]),
        "old_kl_coef": st.sampled_from([0.0, 0.2]),
    }
)
HEAD = st.fixed_dictionaries({"temperature": st.sampled_from([1.0, 0.7]), "softcap": st.sampled_from([None, 4.0])})


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device=DEVICE)


def row_inputs(logprobs: Tensor, *, dead: float = 0.3) -> dict[str, Any]:
    """Constants of the rows: ratios on both sides of every clip, a few dead rows, advantages of both signs."""
    R, like = logprobs.shape[0], {"dtype": logprobs.dtype, "device": logprobs.device}
    weights = torch.rand(R, **like) + 0.1
    return {
        "old_logprobs": logprobs.detach() + 0.4 * torch.randn(R, **like),
        "advantages": torch.randn(R, **like),
        "weights": torch.where(torch.rand(R, **like) < dead, 0, weights),
        "ref_logprobs": logprobs.detach() + 0.5 * torch.randn(R, **like),
        "is_weights": torch.rand(R, **like) * 2,
    }


def head_inputs(R: int, H: int, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = torch.randn(R, H, device=DEVICE).to(dtype)
    weight = (2 * torch.randn(V, H, device=DEVICE) / math.sqrt(H)).to(dtype)
    return hidden, weight, torch.randn(V, device=DEVICE).to(dtype), torch.randint(V, (R,), device=DEVICE)


def reference_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: dict[str, Any], **kwargs: Any
) -> Any:
    head = HeadSettings(temperature=kwargs.pop("temperature", 1.0), softcap=kwargs.pop("softcap", None))
    logprobs, entropy = reference_token_logprobs(hidden, weight, targets, head, bias=bias)
    return reference_ppo_loss(logprobs, PPORows(**rows), PPOSettings(**kwargs), entropy)


def by_hand(logp: float, row: dict[str, float], s: dict[str, Any], entropy: float) -> float:
    """Loss of one row in plain Python."""
    x = logp - row["old_logprobs"]
    r, A, d = math.exp(x), row["advantages"], logp - row["ref_logprobs"]
    clipped = min(max(r, 1 - s["clip_low"]), 1 + s["clip_high"])
    surrogate = max(-A * r, -A * clipped)
    if s["dual_clip"] is not None and A < 0:
        surrogate = min(surrogate, -s["dual_clip"] * A)
    kl = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[s["kl_estimator"].rstrip("+")]
    rest = s["kl_coef"] * kl + s["old_kl_coef"] * (r - 1 - x) - s["entropy_coef"] * entropy
    return row["weights"] * (row["is_weights"] * surrogate + rest)
