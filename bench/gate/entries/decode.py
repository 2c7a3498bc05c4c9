"""Attention of one new token per sequence: what it reads must come in loads of 16 bytes."""

from functools import partial
from typing import Any

import torch

from fastppo_kernels import gpu
from fastppo_kernels.settings import DecodeSettings
from gate.entry import EVERYWHERE, Budget, Entry


def decode(heads: int, kv_heads: int, D: int, dtype: torch.dtype, span: int, **settings: Any) -> None:
    """Two sequences."""
    q = torch.zeros(2, heads, D, dtype=dtype)
    k, v = torch.zeros(2, 2, kv_heads, D, dtype=dtype)
    keys, values = torch.zeros(2, 2, kv_heads, span, D, dtype=dtype)
    s = DecodeSettings(scale=0.125, span=span, **settings)
    gpu.decode_attention(q, k, v, keys, values, torch.tensor([3, 9]), s)


def entry(name: str, call: partial[None], narrow: int = 0, **changes: Any) -> Entry:
    """`narrow`: joining chunks reads two numbers of each."""
    return Entry(name=f"decode {name}", call=call, budget=Budget(registers=255, narrow=narrow), **changes)


ENTRIES = [
    entry("bf16 14/2 D=64", partial(decode, 14, 2, 64, torch.bfloat16, 512), targets=EVERYWHERE),
    entry("bf16 32/8 D=128 chunks", partial(decode, 32, 8, 128, torch.bfloat16, 4096), narrow=10, targets=EVERYWHERE),
    entry("bf16 8/4 D=256 softcap", partial(decode, 8, 4, 256, torch.bfloat16, 512, softcap=50.0, window=400)),
    entry("fp32 14/2 D=64", partial(decode, 14, 2, 64, torch.float32, 512)),
]
