"""The row kernel in each of its forms, and decode attention, small: what gpu_suite.sh runs under compute-sanitizer.

One block and several, tails, rows that end with the allocation, a gradient in memory of its own, over the logits, and
of half their width over them; rows shared between programs; targets outside the vocabulary.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from fastppo_kernels import gpu
from fastppo_kernels.gpu.decode import CHUNK
from fastppo_kernels.reference import PPORows
from fastppo_kernels.settings import DecodeSettings, HeadSettings, PPOSettings

HEAD, SETTINGS = HeadSettings(temperature=0.7), PPOSettings(kl_coef=0.1, entropy_coef=0.01, dual_clip=3.0)
ROWS = 3


def gradients(logits: Tensor) -> list[Tensor]:
    """Memory for the gradient, in every place where it may be."""
    places = [torch.empty_like(logits), logits]
    if logits.dtype == torch.float32 and logits.is_contiguous():
        places.append(logits.view(torch.bfloat16)[:, : logits.shape[1]])
    return places


def run(vocab_size: int, dtype: torch.dtype, first_column: int, split: bool) -> None:
    """Every form at one shape; the rows begin at `first_column` of a matrix that ends with them."""
    shape = (ROWS, vocab_size + first_column)
    for place in range(len(gradients(torch.empty(shape, dtype=dtype, device="cuda")[:, first_column:]))):
        logits, x = torch.randn(shape, device="cuda").to(dtype)[:, first_column:], torch.ones(ROWS, device="cuda")
        targets, rows = torch.tensor([0, vocab_size - 1, -100], device="cuda"), PPORows(x, x, x, x)
        gpu.logprob_rows(logits, targets, HEAD, entropy=True, split=split)
        dlogits = gradients(logits)[place]
        gpu.ppo_rows(logits, targets, rows, SETTINGS, HEAD, entropy=True, dlogits=dlogits, split=split)
    torch.cuda.synchronize()


def decode(length: int, window: int | None, dtype: torch.dtype) -> None:
    """One new token each at the first and the last place of memory that ends there."""
    q, k = torch.randn(2, 4, 64, device="cuda").to(dtype), torch.randn(2, 2, 64, device="cuda").to(dtype)
    keys, values = torch.randn(2, 2, 2, length, 64, device="cuda").to(dtype)
    positions = torch.tensor([0, length - 1], device="cuda")
    settings = DecodeSettings(scale=0.125, span=length, window=window)
    gpu.decode_attention(q, k, k, keys, values, positions, settings)
    torch.cuda.synchronize()


def main() -> int:
    """Run everything; 2 without a GPU."""
    if not torch.cuda.is_available():
        print("sanitized_rows.py needs a CUDA GPU: torch.cuda.is_available() is False here", file=sys.stderr)
        return 2
    for vocab_size, first_column in ((127, 1), (1000, 0), (40000, 0)):
        run(vocab_size, torch.float32, first_column, split=False)
    run(40000, torch.float32, 0, split=True)
    run(40001, torch.bfloat16, 0, split=True)
    for length in (33, CHUNK + 7):
        decode(length, None, torch.bfloat16)
        decode(length, 20, torch.float32)
    print("every form of the row kernel ran, and decode attention")
    return 0


if __name__ == "__main__":
    sys.exit(main())
