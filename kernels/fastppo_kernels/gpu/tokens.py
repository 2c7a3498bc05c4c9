"""The PPO objective from log-probabilities: the row kernel's function of one token, many tokens to a program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo_kernels.gpu.launch import NO_DUAL_CLIP, check_device, on_device, options, vector
from fastppo_kernels.gpu.maths import ESTIMATOR_CODES, NUM_COLUMNS, ppo_token, table_lines
from fastppo_kernels.reference import PPORows
from fastppo_kernels.settings import PPOSettings
from fastppo_kernels.table import PPO_COLUMNS

BLOCK = 128
THREADS = 128


@triton.jit
def _load_or_none(ptr, token, inside):
    if ptr is None:
        return None
    else:
        return tl.load(ptr + token, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["num_tokens"])
def tokens_kernel(
    table_ptr,  # (R, 16) float32
    logprobs_ptr,  # (R,) float32, as are the others; None where there is none
    entropy_ptr, weights_ptr, advantages_ptr, old_ptr, ref_ptr, is_ptr, sampler_ptr,
    num_tokens,
    clip_low, clip_high, dual_clip, kl_coef, old_kl_coef, entropy_coef,
    ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, NUM_COLUMNS)[None, :]
    inside = token < num_tokens
    weight = tl.load(weights_ptr + token, mask=inside, other=0.0)
    live = weight != 0.0
    logprob = tl.load(logprobs_ptr + token, mask=inside, other=0.0)
    entropy = tl.zeros_like(logprob)
    if entropy_ptr is not None:
        entropy = tl.load(entropy_ptr + token, mask=inside, other=0.0)
    old = logprob
    if old_ptr is not None:
        old = tl.load(old_ptr + token, mask=inside, other=0.0)
    terms = ppo_token(
        logprob, entropy, old, tl.load(advantages_ptr + token, mask=inside, other=0.0), weight,
        _load_or_none(ref_ptr, token, inside), _load_or_none(is_ptr, token, inside),
        _load_or_none(sampler_ptr, token, inside),
        (clip_low, clip_high, dual_clip, kl_coef, old_kl_coef, entropy_coef), ESTIMATOR,
    )  # fmt: skip
    tl.store(table_ptr + token * NUM_COLUMNS + column, table_lines(column, live, terms), mask=inside)


def ppo_tokens(logprobs: Tensor, entropy: Tensor | None, rows: PPORows, settings: PPOSettings) -> Tensor:
    """(R, 16) float32 table from (R,) log-probs and entropies; a token of weight 0 gives zeros.

    Raises:
        ValueError: CPU tensors without the interpreter.
    """
    check_device(logprobs)
    num_tokens = logprobs.shape[0]
    table = torch.empty(num_tokens, len(PPO_COLUMNS), dtype=torch.float32, device=logprobs.device)
    if num_tokens == 0:
        return table
    old, advantages, weights, ref, is_weights, sampler = (vector(x) for x in rows)
    dual_clip = NO_DUAL_CLIP if settings.dual_clip is None else settings.dual_clip
    clips = (settings.clip_low, settings.clip_high, dual_clip)
    scalars = (*clips, settings.kl_coef, settings.old_kl_coef, settings.entropy_coef)
    vectors = (vector(logprobs), vector(entropy), weights, advantages, old, ref, is_weights, sampler)
    with on_device(logprobs):
        tokens_kernel[(triton.cdiv(num_tokens, BLOCK),)](
            table,
            *vectors,
            num_tokens,
            *map(float, scalars),
            ESTIMATOR=ESTIMATOR_CODES[settings.kl_estimator],
            BLOCK=BLOCK,
            **options(THREADS),
        )
    return table
