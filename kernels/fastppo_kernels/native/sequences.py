"""Ops over packed sequences in C++: CPU tensors only. Letters: B sequences, N packed tokens."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from fastppo_kernels.native.isa import chosen_isa
from fastppo_kernels.native.library import load

_POINTER, _INT, _INT64, _DOUBLE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double
_MOMENTS_BLOCK = 1024  # kMomentsBlock of loops.h
_ESTIMATORS = {"k1": 1, "k2": 2, "k3": 3}


def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float,
    lam: float,
    mask: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), (N,) float32, accumulated in float64. See `fastppo_kernels.gae`.

    Raises:
        ValueError: cu_seqlens does not rise from 0 or more to N at most.
    """
    num_tokens, num_sequences = rewards.shape[0], cu_seqlens.shape[0] - 1
    inputs = [_contiguous(x) for x in (rewards, values, cu_seqlens.cpu(), mask, bootstrap_values)]
    advantages, returns = (torch.empty(num_tokens, dtype=torch.float32) for _ in range(2))
    pointers, outputs = [_pointer(x) for x in inputs], (advantages.data_ptr(), returns.data_ptr())
    how = (chosen_isa(), torch.get_num_threads())
    if _library().fastppo_gae(num_sequences, num_tokens, *pointers, gamma, lam, *outputs, *how):
        raise _no_layout(cu_seqlens, num_tokens)
    return advantages, returns


def token_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    cu_seqlens: Tensor,
    *,
    kl_coef: float,
    kl_estimator: str,
    mask: Tensor | None = None,
) -> Tensor:
    """(N,) float32 rewards, made in float64. See `fastppo_kernels.token_rewards`.

    Raises:
        ValueError: cu_seqlens does not rise from 0 or more to N at most.
    """
    num_tokens, num_sequences = logprobs.shape[0], cu_seqlens.shape[0] - 1
    scores, logprobs = scores.contiguous(), logprobs.contiguous()
    others = [_contiguous(x) for x in (ref_logprobs, cu_seqlens.cpu(), mask)]
    rewards = torch.empty(num_tokens, dtype=torch.float32)
    given = (scores.data_ptr(), scores.shape[0] == num_tokens, logprobs.data_ptr(), *[_pointer(x) for x in others])
    estimator = _ESTIMATORS[kl_estimator.removesuffix("+")]  # "+" changes the gradient alone
    how = (kl_coef, estimator, rewards.data_ptr(), torch.get_num_threads())
    if _library().fastppo_token_rewards(num_sequences, num_tokens, *given, *how):
        raise _no_layout(cu_seqlens, num_tokens)
    return rewards


def moments(values: Tensor, mask: Tensor | None) -> Tensor:
    """(3,) float64 of the float32 values of any shape where `mask`, of that shape, is True (None: everywhere).

    Count, mean and sum of the squared deviations from the mean: blocks of 1024 values, merged in order, so that equal
    values have deviations of exactly 0 and a large mean cancels nothing. All 0 where nothing is valid.
    """
    values, mask = values.contiguous(), _contiguous(mask)
    out = torch.empty(3, dtype=torch.float64)
    blocks = torch.empty(-(-values.numel() // _MOMENTS_BLOCK), 3, dtype=torch.float64)
    pointers = [_pointer(x) for x in (values, mask, blocks, out)]
    _library().fastppo_moments(values.numel(), *pointers, chosen_isa(), torch.get_num_threads())
    return out


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _no_layout(cu_seqlens: Tensor, num_tokens: int) -> ValueError:
    return ValueError(
        f"cu_seqlens must rise from 0 or more to at most N = {num_tokens}, got {cu_seqlens.tolist()[:8]}...; "
        "pass the cumulative lengths of the sequences"
    )


@cache
def _library() -> ctypes.CDLL:
    library = load()
    library.fastppo_gae.argtypes = [_INT64, _INT64, *[_POINTER] * 5, _DOUBLE, _DOUBLE, *[_POINTER] * 2, _INT, _INT]
    given, how = [_POINTER, _INT, *[_POINTER] * 4], [_DOUBLE, _INT, _POINTER, _INT]
    library.fastppo_token_rewards.argtypes = [_INT64, _INT64, *given, *how]
    library.fastppo_moments.argtypes = [_INT64, *[_POINTER] * 4, _INT, _INT]
    library.fastppo_moments.restype = None
    return library
