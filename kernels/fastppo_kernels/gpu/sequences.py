"""Ops over packed sequences in Triton: one program per sequence, read backwards one block at a time.

    A_t = delta_t + gamma lam A_next(t)      delta_t = r_t + gamma V_next(t) - V_t      (arXiv:1506.02438, eq. 16)

A -> a A + b is a map that composes associatively, so a block is one scan and a scalar carries over to the block before
it. A token that is no action is the identity. Where there are such tokens, the value of the next action is found by a
scan too. Tokens outside every sequence belong to the first or the last program, which treats them as no actions.
"""

# pyright: reportGeneralTypeIssues=false
# (a Triton device function that returns several values looks to it like one that never returns)

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo_kernels.gpu.launch import check_device, on_device
from fastppo_kernels.gpu.maths import ESTIMATOR_CODES, kl_penalty

BLOCK_TOKENS = 1024
BLOCK_VALUES = 4096  # numbers of a program of moments


@triton.jit
def _extent(cu_seqlens_ptr, B, N):
    """(first token, end) of this program's sequence and of all the tokens it writes, never outside [0, N]."""
    b = tl.program_id(0)
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + b), 0), N)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + b + 1), 0), N)
    return start, end, tl.where(b == 0, 0, start), tl.where(b == B - 1, N, end)


@triton.jit
def _is_action(t, start, end, mask_ptr):
    """Whether token t is an action of the sequence; mask_ptr (N,) uint8 or None."""
    inside = (t >= start) & (t < end)
    if mask_ptr is not None:
        inside = inside & (tl.load(mask_ptr + t, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _compose(a1, b1, a2, b2):
    """The map of a2, b2 after the map of a1, b1."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _latest(found1, value1, found2, value2):
    """The second value if it was found, else the first."""
    return found1 | found2, tl.where(found2 != 0, value2, value1)


@triton.jit
def _last(x, BLOCK: tl.constexpr):
    """x[-1], whatever the others hold."""
    return tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, x, 0.0), axis=0)


@triton.jit
def _gae_kernel(
    rewards_ptr,  # (N,)
    values_ptr,  # (N,)
    cu_seqlens_ptr,  # (B+1,) int32
    mask_ptr,  # (N,) uint8 or None
    bootstrap_ptr,  # (B,) or None
    advantages_ptr,  # (N,) float32
    returns_ptr,  # (N,) float32
    B,
    N,
    gamma,
    decay,  # gamma * lam
    BLOCK: tl.constexpr,
):
    start, end, low, high = _extent(cu_seqlens_ptr, B, N)
    value_after, advantage_after = 0.0, 0.0  # of the first action after the block
    if bootstrap_ptr is not None:
        value_after = tl.load(bootstrap_ptr + tl.program_id(0)).to(tl.float32)
    for block in range(0, tl.cdiv(high - low, BLOCK)):
        t = high - 1 - block * BLOCK - tl.arange(0, BLOCK)  # lane 0 is the latest token
        action = _is_action(t, start, end, mask_ptr)
        reward = tl.load(rewards_ptr + t, mask=action, other=0.0).to(tl.float32)
        value = tl.load(values_ptr + t, mask=action, other=0.0).to(tl.float32)
        found = _is_action(t + 1, start, end, mask_ptr)
        next_value = tl.load(values_ptr + t + 1, mask=found, other=0.0).to(tl.float32)
        if mask_ptr is not None:
            ever, next_value = tl.associative_scan((found.to(tl.int32), next_value), 0, _latest)
            next_value = tl.where(ever != 0, next_value, value_after)
            value_after = _last(next_value, BLOCK)
        else:
            next_value = tl.where(found, next_value, value_after)
        delta = tl.where(action, reward + gamma * next_value - value, 0.0)
        a, b = tl.associative_scan((tl.where(action, decay, 1.0), delta), 0, _compose)
        advantage = tl.where(decay != 0, a * advantage_after + b, delta)  # 0 * NaN of a later action is not 0
        advantage_after = _last(advantage, BLOCK)
        tl.store(advantages_ptr + t, tl.where(action, advantage, 0.0), mask=t >= low)
        tl.store(returns_ptr + t, tl.where(action, advantage + value, 0.0), mask=t >= low)


@triton.jit
def _token_rewards_kernel(
    scores_ptr,  # (B,), or (N,) if PER_TOKEN
    logprobs_ptr,  # (N,)
    ref_logprobs_ptr,  # (N,) or None: no penalty
    cu_seqlens_ptr,  # (B+1,) int32
    mask_ptr,  # (N,) uint8 or None
    rewards_ptr,  # (N,) float32
    B,
    N,
    kl_coef,
    ESTIMATOR: tl.constexpr,  # a value of ESTIMATOR_CODES
    PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start, end, low, high = _extent(cu_seqlens_ptr, B, N)
    last_action = -1
    for block in range(0, tl.cdiv(high - low, BLOCK)):
        t = high - 1 - block * BLOCK - tl.arange(0, BLOCK)
        action = _is_action(t, start, end, mask_ptr)
        scored = action
        if not PER_TOKEN:
            last_action = tl.maximum(last_action, tl.max(tl.where(action, t, -1), axis=0))
            scored = action & (t == last_action)
        at = t if PER_TOKEN else tl.zeros_like(t) + tl.program_id(0)
        reward = tl.load(scores_ptr + at, mask=scored, other=0.0).to(tl.float32)
        if ref_logprobs_ptr is not None:
            logprob = tl.load(logprobs_ptr + t, mask=action, other=0.0).to(tl.float32)
            ref_logprob = tl.load(ref_logprobs_ptr + t, mask=action, other=0.0).to(tl.float32)
            reward -= kl_coef * kl_penalty(logprob, ref_logprob, ESTIMATOR)[0]
        tl.store(rewards_ptr + t, tl.where(action, reward, 0.0), mask=t >= low)


@triton.jit
def _partial_moments_kernel(
    values_ptr,  # (N,)
    mask_ptr,  # (N,) uint8 or None
    partial_ptr,  # (3, programs) float64: count, mean, sum of squared deviations of a block
    N,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = _is_action(i, 0, N, mask_ptr)
    x = tl.load(values_ptr + i, mask=live, other=0.0).to(tl.float64)
    count = tl.sum(live.to(tl.float64), axis=0)
    mean = tl.sum(x, axis=0) / tl.maximum(count, 1.0)
    centred = tl.where(live, x - mean, 0.0)
    programs, out = tl.num_programs(0), partial_ptr + tl.program_id(0)
    tl.store(out, count)
    tl.store(out + programs, mean)
    tl.store(out + 2 * programs, tl.sum(centred * centred, axis=0))


@triton.jit
def _merge_moments_kernel(
    partial_ptr,  # (3, P) float64
    out_ptr,  # (3,) float64
    P,
    BLOCK: tl.constexpr,
):
    """Moments of a union: the deviations of each part, and those of its mean from the common one (Chan et al. 1979)."""
    lane = tl.arange(0, BLOCK)
    counts, totals = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for first in range(0, P, BLOCK):
        count = tl.load(partial_ptr + first + lane, mask=first + lane < P, other=0.0)
        counts += count
        totals += count * tl.load(partial_ptr + P + first + lane, mask=first + lane < P, other=0.0)
    count = tl.sum(counts, axis=0)
    mean = tl.sum(totals, axis=0) / tl.maximum(count, 1.0)
    squares = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, P, BLOCK):
        part = tl.load(partial_ptr + first + lane, mask=first + lane < P, other=0.0)
        shift = tl.load(partial_ptr + P + first + lane, mask=first + lane < P, other=0.0) - mean
        squares += tl.load(partial_ptr + 2 * P + first + lane, mask=first + lane < P, other=0.0)
        squares += tl.where(part > 0, part * shift * shift, 0.0)
    tl.store(out_ptr, count)
    tl.store(out_ptr + 1, mean)
    tl.store(out_ptr + 2, tl.sum(squares, axis=0))


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
    """(advantages, returns), (N,) float32; inputs of any float dtype. See `fastppo_kernels.gae`.

    cu_seqlens must rise within [0, N]. What it says is not checked, which would wait for the device: if it does not
    rise, tokens are left unwritten, but nothing is read or written out of bounds.

    Raises:
        ValueError: CPU tensors, and kernels are not interpreted.
    """
    check_device(rewards)
    num_sequences, num_tokens = cu_seqlens.shape[0] - 1, rewards.shape[0]
    r, v, cu, live, after = _flat(rewards, values, cu_seqlens, _bytes(mask), bootstrap_values)
    advantages, returns = (_output(num_tokens, num_sequences, rewards.device) for _ in range(2))
    sizes, discounts = (num_sequences, num_tokens), (gamma, gamma * lam)
    with on_device(rewards):
        if num_sequences:
            grid = (num_sequences,)
            _gae_kernel[grid](r, v, cu, live, after, advantages, returns, *sizes, *discounts, BLOCK=BLOCK_TOKENS)
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
    """(N,) float32 rewards; scores (B,) or, if B != N or every sequence has one token, (N,).

    See `fastppo_kernels.token_rewards`, and `gae` above for cu_seqlens. The log-probs are not read with kl_coef = 0.

    Raises:
        ValueError: CPU tensors, and kernels are not interpreted.
    """
    check_device(logprobs)
    num_sequences, num_tokens = cu_seqlens.shape[0] - 1, logprobs.shape[0]
    credit, lp, ref, cu, live = _flat(scores, logprobs, ref_logprobs if kl_coef else None, cu_seqlens, _bytes(mask))
    rewards = _output(num_tokens, num_sequences, logprobs.device)
    per_token = scores.shape[0] == num_tokens
    constants = {"ESTIMATOR": ESTIMATOR_CODES[kl_estimator], "PER_TOKEN": per_token, "BLOCK": BLOCK_TOKENS}
    with on_device(logprobs):
        if num_sequences:
            grid, sizes = (num_sequences,), (num_sequences, num_tokens)
            _token_rewards_kernel[grid](credit, lp, ref, cu, live, rewards, *sizes, kl_coef, **constants)
    return rewards


def moments(values: Tensor, mask: Tensor | None) -> Tensor:
    """(3,) float64: count, mean and sum of squared deviations of the masked values (any shape); 0 where there are none.

    Two passes within a block, in float64, so equal values deviate by exactly 0; blocks are joined in a fixed order.

    Raises:
        ValueError: CPU tensors, and kernels are not interpreted.
    """
    check_device(values)
    x, live = _flat(values, _bytes(mask))
    num_values = values.numel()
    programs = triton.cdiv(num_values, BLOCK_VALUES)
    partial = torch.empty(3, programs, dtype=torch.float64, device=values.device)
    merged = partial.new_empty(3)
    with on_device(values):
        if programs:
            _partial_moments_kernel[(programs,)](x, live, partial, num_values, BLOCK=BLOCK_VALUES)
        _merge_moments_kernel[(1,)](partial, merged, programs, BLOCK=256)
    return merged


def _output(num_tokens: int, num_sequences: int, device: torch.device) -> Tensor:
    """(N,) float32, zeros if there is no program to write them."""
    make = torch.empty if num_sequences else torch.zeros
    return make(num_tokens, dtype=torch.float32, device=device)


def _flat(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.detach().contiguous() for x in tensors]


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)
