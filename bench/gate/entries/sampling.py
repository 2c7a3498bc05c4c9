"""Sampling: whole, truncated, from an unaligned vocabulary."""

from functools import partial
from typing import Any

import torch

from fastppo_kernels import gpu
from gate.entry import EVERYWHERE, Budget, Entry

LLAMA = 128256


def sample(vocab_size: int, dtype: torch.dtype, *, top_k: int = 0, top_p: float = 1.0) -> None:
    """A row stride that is a multiple of 64, whatever the vocabulary."""
    stride = -(-vocab_size // 64) * 64
    logits = torch.empty(2, stride, dtype=dtype)[:, :vocab_size]
    gpu.sample(logits, torch.rand(2), temperature=0.7, top_k=top_k, top_p=top_p)


def entry(name: str, call: partial[None], per_element: float, **changes: Any) -> Entry:
    """Instructions per column are counted on sm_90, over every sweep that the kernel holds."""
    budget = Budget(registers=128, per_element={"sm_90": per_element})
    return Entry(name=f"sample {name}", call=call, budget=budget, elements=per_thread, **changes)


def per_thread(arguments: dict[str, Any]) -> int:
    """Columns that a thread takes per turn of the loop: the launcher takes a warp for every 512."""
    return min(16, arguments["BLOCK"] // 32)


ENTRIES = [
    entry("bf16", partial(sample, LLAMA, torch.bfloat16), 12.5, targets=EVERYWHERE),
    entry("fp16", partial(sample, LLAMA, torch.float16), 12.5, targets=("sm_90", "gfx942")),
    entry("fp32", partial(sample, LLAMA, torch.float32), 11.5),
    entry("bf16 ragged vocab", partial(sample, 50257, torch.bfloat16), 12.5),
    entry("bf16 top_k top_p", partial(sample, LLAMA, torch.bfloat16, top_k=50, top_p=0.9), 96),
    entry("bf16 top_p", partial(sample, LLAMA, torch.bfloat16, top_p=0.9), 64),
]
