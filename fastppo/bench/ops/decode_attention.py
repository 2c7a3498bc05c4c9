"""Attention of one new token per sequence to the keys and values before it: a decode step's, of one layer.

    fastppo bench kernels --ops decode_attention [--shapes 256,14,2,64,1024] [--out FILE]

Sequences are between a quarter of the context and all of it long. Least bytes: the live keys and values once, queries
in, results out. PyTorch's SDPA reads all of the context under a mask, flash-attn's kernel for it takes a layout of its
own.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastppo.bench import arguments, harness
from fastppo.bench.harness import Case, Outputs, Variant
from fastppo_kernels import decode_attention

LETTERS = "n,heads,kv_heads,D,context"
SHAPES = [(32, 12, 4, 64, 256), (64, 14, 2, 64, 512)], [(256, 14, 2, 64, 1024), (64, 32, 8, 128, 4096)]  # CPU, GPU
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


class Problem(NamedTuple):
    q: Tensor  # (n, heads, D)
    k: Tensor  # (n, kv_heads, D)
    v: Tensor
    keys: Tensor  # (n, kv_heads, context, D)
    values: Tensor
    positions: Tensor  # (n,)


def make_problem(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Problem:
    n, heads, kv_heads, D, context = shape
    made = partial(torch.randn, device=device, dtype=dtype)
    keys, values = (made(n, kv_heads, context, D) for _ in "kv")
    positions = torch.randint(context // 4, context, (n,), device=device)
    return Problem(made(n, heads, D), made(n, kv_heads, D), made(n, kv_heads, D), keys, values, positions)


def fastppo(p: Problem, backend: str | None = None) -> Outputs:
    return {"out": decode_attention(*p, backend=backend)}


def sdpa(p: Problem) -> Outputs:
    rows, context = torch.arange(len(p.q), device=p.q.device), torch.arange(p.keys.shape[2], device=p.q.device)
    p.keys[rows, :, p.positions], p.values[rows, :, p.positions] = p.k, p.v
    mask = (context <= p.positions[:, None])[:, None, None]
    return {"out": F.scaled_dot_product_attention(p.q[:, :, None], p.keys, p.values, mask, enable_gqa=True).squeeze(2)}


def flash_attn(p: Problem, module: Any) -> Variant:
    """Its memory is (n, context, kv_heads, D)."""
    keys, values = (x.transpose(1, 2).contiguous() for x in (p.keys, p.values))
    q, k, v, lengths = p.q[:, None], p.k[:, None], p.v[:, None], p.positions.int()
    call = partial(module.flash_attn_with_kvcache, q, keys, values, k, v, cache_seqlens=lengths, causal=True)
    return Variant(run=lambda: {"out": call().squeeze(1)})


def variants(p: Problem) -> dict[str, Variant | str]:
    return {
        harness.OURS: Variant(run=lambda: fastppo(p)),
        "fastppo reference": Variant(run=lambda: fastppo(p, "reference")),
        "torch sdpa": Variant(run=lambda: sdpa(p)),
        "flash-attn": harness.peer("flash_attn", partial(flash_attn, p)),
    }


def cases(options: Any) -> Iterator[Case]:
    shapes: Any = [(4, 4, 2, 16, 64)] if options.quick else options.shapes or SHAPES[options.device != "cpu"]
    settings: Any = itertools.product(shapes, options.dtypes)
    for shape, name in settings:
        dtype = getattr(torch, name)
        p = make_problem(shape, dtype, options.device)
        double = {name: getattr(p, name).double() for name in p._fields if name != "positions"}
        exact = fastppo(p._replace(**double), "reference")
        live = int(p.positions.sum()) + len(p.q)
        yield Case(
            op="decode_attention",
            setting={"dtype": name, **dict(zip(LETTERS.split(","), shape, strict=True))},
            variants=variants(p),
            truth=exact,
            tolerance=TOLERANCE[dtype],
            num_bytes=dtype.itemsize * (2 * live * p.k[0].numel() + 2 * p.q.numel() + 2 * p.k.numel()),
            flops=4.0 * live * p.q[0].numel(),
            dtype=dtype,
            tokens=len(p.q),
        )


def parser() -> argparse.ArgumentParser:
    made = arguments.parser(__doc__, repeats=9)
    made.add_argument("--shapes", type=arguments.sizes(LETTERS), nargs="+", metavar=LETTERS)
    return made
