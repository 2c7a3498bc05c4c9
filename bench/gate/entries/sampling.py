"""Sampling: whole, truncated, from an unaligned vocabulary."""

from functools import partial

import torch

from fastppo_kernels import gpu
from gate.entry import Budget, Entry

LLAMA = 128256


def sample(vocab_size: int, dtype: torch.dtype, *, top_k: int = 0, top_p: float = 1.0) -> None:
    """A row stride that is a multiple of 64, whatever the vocabulary."""
    stride = -(-vocab_size // 64) * 64
    logits = torch.empty(2, stride, dtype=dtype)[:, :vocab_size]
    gpu.sample(logits, torch.rand(2), temperature=0.7, top_k=top_k, top_p=top_p)


BUDGET = Budget(registers=128)
ENTRIES = [
    Entry(name="sample bf16", call=partial(sample, LLAMA, torch.bfloat16), budget=BUDGET),
    Entry(name="sample fp32", call=partial(sample, LLAMA, torch.float32), budget=BUDGET),
    Entry(name="sample bf16 ragged vocab", call=partial(sample, 50257, torch.bfloat16), budget=BUDGET),
    Entry(name="sample bf16 top_k top_p", call=partial(sample, LLAMA, torch.bfloat16, top_k=50, top_p=0.9)),
    Entry(name="sample bf16 top_p", call=partial(sample, LLAMA, torch.bfloat16, top_p=0.9)),
]
