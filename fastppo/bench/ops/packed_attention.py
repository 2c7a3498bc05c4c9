"""Causal attention within packed sequences, forward and backward: what a layer does with a micro-batch on a CPU.

    fastppo bench kernels --ops packed_attention [--shapes 16,64,14,2,64] [--out FILE]

Sequences are of one length, so PyTorch's SDPA, which pads, has nothing to pad. Least bytes: q, k, v, the result and
their gradients once each, and again what the backward pass reads; least operations: seven products over the pairs of
tokens that see each other. GPUs run flash-attn or PyTorch's varlen kernel, which are not fastppo's to measure.
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
from fastppo_kernels import packed_attention

LETTERS = "sequences,length,heads,kv_heads,D"
SHAPES = [(16, 64, 4, 2, 32), (16, 64, 14, 2, 64), (4, 512, 14, 2, 64)]


class Problem(NamedTuple):
    q: Tensor  # (sequences, length, heads, D)
    k: Tensor  # (sequences, length, kv_heads, D)
    v: Tensor
    dout: Tensor


def make_problem(shape: tuple[int, ...]) -> Problem:
    b, T, heads, kv_heads, D = shape
    q, k, v, dout = (torch.randn(b, T, n, D) for n in (heads, kv_heads, kv_heads, heads))
    return Problem(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout)


def both_passes(p: Problem, out: Tensor) -> Outputs:
    """`out` (sequences, length, heads, D) and the gradients."""
    names = ("dq", "dk", "dv")
    return {"out": out.detach(), **dict(zip(names, torch.autograd.grad(out, (p.q, p.k, p.v), p.dout), strict=True))}


def fastppo(p: Problem, backend: str | None = None) -> Outputs:
    b, T = p.q.shape[:2]
    cu_seqlens = torch.arange(0, b * T + 1, T, dtype=torch.int32)
    q, k, v = (x.flatten(0, 1) for x in (p.q, p.k, p.v))
    return both_passes(p, packed_attention(q, k, v, cu_seqlens, backend=backend).view_as(p.q))


def sdpa(p: Problem) -> Outputs:
    q, k, v = (x.transpose(1, 2) for x in (p.q, p.k, p.v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return both_passes(p, out.transpose(1, 2))


def variants(p: Problem) -> dict[str, Variant | str]:
    return {
        harness.OURS: Variant(run=partial(fastppo, p)),
        "fastppo reference": Variant(run=partial(fastppo, p, "reference")),
        "torch sdpa": Variant(run=partial(sdpa, p)),
    }


def cases(options: Any) -> Iterator[Case]:
    if options.device != "cpu":
        print("packed_attention is of the CPU: GPUs run flash-attn or PyTorch's varlen kernel")
        return
    shapes: Any = [(3, 16, 4, 2, 16)] if options.quick else options.shapes or SHAPES
    for shape, name in itertools.product(shapes, options.dtypes):
        if name != "float32":
            continue  # the kernel is of float32 alone
        p = make_problem(shape)
        b, T, heads, _, D = shape
        yield Case(
            op="packed_attention",
            setting={"dtype": name, **dict(zip(LETTERS.split(","), shape, strict=True))},
            variants=variants(p),
            truth=fastppo(Problem(*(x.detach().double().requires_grad_() for x in p))),
            tolerance=1e-5,
            num_bytes=4.0 * 6 * (p.q.numel() + p.k.numel()),
            flops=7 * 2.0 * b * heads * D * T * (T + 1) / 2,
            tokens=b * T,
        )


def parser() -> argparse.ArgumentParser:
    made = arguments.parser(__doc__, repeats=15)
    made.add_argument("--shapes", type=arguments.sizes(LETTERS), nargs="+", metavar=LETTERS)
    return made
