"""The critic's loss from hidden states and the value head, with the gradients of both.

    fastppo bench kernels --ops value [--shapes 8192,4096] [--out FILE]

Least bytes: hidden read once and its gradient written once, 2 * R * H * itemsize. "copy" moves as many and computes
nothing. Products are vectors times matrices: bandwidth, not arithmetic, is the limit.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastppo.bench import arguments, harness
from fastppo.bench.harness import Case, Outputs, Variant
from fastppo.bench.problems import gradients, leaf
from fastppo_kernels import linear_value_loss

CLIP = 0.2
SHAPES = [(4096, 896), (4096, 4096)], [(8192, 4096), (16384, 896)]  # CPU, GPU


class Problem(NamedTuple):
    hidden: Tensor  # (R, H)
    weight: Tensor  # (H,)
    bias: Tensor  # ()
    old_values: Tensor  # (R,), and below
    returns: Tensor
    weights: Tensor


def make_problem(R: int, H: int, dtype: torch.dtype, device: str) -> Problem:
    hidden = torch.randn(R, H, device=device).to(dtype)
    weight = torch.randn(H, device=device).mul_(1 / H**0.5).to(dtype)
    values = hidden.float() @ weight.float()
    old, returns = (values + s * torch.randn(R, device=device) for s in (0.2, 1.0))
    weights = torch.full((R,), 1.0 / R, device=device)
    return Problem(hidden, weight, torch.zeros((), dtype=dtype, device=device), old, returns, weights)


def plain(p: Problem) -> Tensor:
    """What a trainer writes, in float32 at least."""
    dtype = torch.promote_types(p.hidden.dtype, torch.float32)
    values = p.hidden.to(dtype) @ p.weight.to(dtype) + p.bias.to(dtype)
    bounded = p.old_values + (values - p.old_values).clamp(-CLIP, CLIP)
    worst = torch.maximum((values - p.returns).square(), (bounded - p.returns).square())
    return (p.weights * 0.5 * worst).sum()


def fastppo(p: Problem, backend: str | None = None) -> Tensor:
    return linear_value_loss(*p, clip=CLIP, backend=backend)[0]


def run(p: Problem, loss: Callable[[Problem], Tensor]) -> Outputs:
    hidden, weight, bias = map(leaf, p[:3])
    made = loss(p._replace(hidden=hidden, weight=weight, bias=bias))
    return gradients(made, hidden=hidden, weight=weight, bias=bias)


def variants(p: Problem) -> dict[str, Variant | str]:
    other = torch.empty_like(p.hidden)
    made: dict[str, Callable[[Problem], Tensor]] = {
        harness.OURS: fastppo,
        "fastppo reference": partial(fastppo, backend="reference"),
        "torch eager": plain,
        "torch.compile": torch.compile(plain, dynamic=False),
    }
    copy = Variant(run=lambda: {"x": other.copy_(p.hidden)}, truth={}, note="same bytes, no result")
    timed: dict[str, Variant | str] = {name: Variant(run=partial(run, p, loss)) for name, loss in made.items()}
    return timed | {"copy": copy}


def cases(options: Any) -> Iterator[Case]:
    shapes: Any = [(64, 64)] if options.quick else options.shapes or SHAPES[options.device != "cpu"]
    for (R, H), name in itertools.product(shapes, options.dtypes):
        dtype = getattr(torch, name)
        p = make_problem(R, H, dtype, options.device)
        yield Case(
            op="linear_value_loss",
            setting={"dtype": name, "R": R, "H": H},
            variants=variants(p),
            truth=run(Problem(*(x.double() for x in p)), plain),
            tolerance=1e-5 if dtype == torch.float32 else 1e-2,
            num_bytes=2 * R * H * dtype.itemsize,
            tokens=R,
        )


def parser() -> argparse.ArgumentParser:
    made = arguments.parser(__doc__)
    made.add_argument("--shapes", type=arguments.sizes("R,H"), nargs="+", metavar="R,H")
    return made
