"""Drawing a token per row and its log-prob: temperature alone, then top-k and top-p.

    fastppo bench kernels --ops sample [--shapes 64,151936] [--out FILE]

Least bytes: every logit read once, R * V * itemsize. fastppo and its reference draw by the inverse CDF of one uniform
number per row and are checked against the same draw in float64; PyTorch draws with torch.multinomial, as generate() of
transformers does, so of its tokens only the log-probs are checked.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastppo.bench import arguments, harness
from fastppo.bench.harness import Case, Outputs, Variant
from fastppo_kernels import sample

SHAPES = [(64, 32000), (64, 151936)], [(256, 128256), (256, 151936)]  # CPU, GPU
CUTS = {"temperature": {}, "top_k=50": {"top_k": 50}, "top_p=0.9": {"top_p": 0.9}}
TEMPERATURE = 0.7


class Problem(NamedTuple):
    logits: Tensor  # (R, V)
    uniform: Tensor  # (R,)
    cut: dict[str, Any]


def make_problem(R: int, V: int, dtype: torch.dtype, device: str, cut: dict[str, Any]) -> Problem:
    return Problem(torch.randn(R, V, device=device).mul_(3).to(dtype), torch.rand(R, device=device), cut)


def fastppo(p: Problem, backend: str | None = None) -> Outputs:
    tokens, logprobs = sample(p.logits, p.uniform, temperature=TEMPERATURE, **p.cut, backend=backend)
    return {"tokens": tokens, "logprobs": logprobs}


def truncated(logits: Tensor, cut: dict[str, Any]) -> Tensor:
    """Logits divided by the temperature, -inf outside the cut: sort, cumulate, mask, put back."""
    z = logits / TEMPERATURE
    if "top_k" in cut:
        return z.masked_fill(z < z.topk(cut["top_k"]).values[:, -1:], -torch.inf)
    if "top_p" in cut:
        ranked, order = z.sort(descending=False)
        outside = ranked.softmax(-1).cumsum(-1) <= 1 - cut["top_p"]
        outside[:, -1] = False
        return z.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    return z


def multinomial(p: Problem) -> Outputs:
    log_p = truncated(p.logits.float(), p.cut).log_softmax(-1)
    tokens = torch.multinomial(log_p.exp(), 1)
    return {"tokens": tokens.squeeze(1), "logprobs": log_p.gather(1, tokens).squeeze(1)}


def log_p_of_tokens(p: Problem, outputs: Outputs) -> Outputs:
    """The log-probs less what float64 makes of these tokens: to be 0."""
    exact = truncated(p.logits.double(), p.cut).log_softmax(-1).gather(1, outputs["tokens"][:, None]).squeeze(1)
    return {"difference": outputs["logprobs"].double() - exact}


def variants(p: Problem) -> dict[str, Variant | str]:
    compiled = torch.compile(multinomial, dynamic=False)
    zero = {"difference": torch.zeros(len(p.uniform), dtype=torch.float64, device=p.uniform.device)}

    def drawn(run: Any) -> Variant:
        return Variant(run=lambda: run(p), truth=zero, pick=lambda outputs: log_p_of_tokens(p, outputs))

    return {
        harness.OURS: Variant(run=lambda: fastppo(p)),
        "fastppo reference": Variant(run=lambda: fastppo(p, "reference")),
        "torch multinomial": drawn(multinomial),
        "torch.compile": drawn(compiled),
    }


def cases(options: Any) -> Iterator[Case]:
    shapes: Any = [(16, 1000)] if options.quick else options.shapes or SHAPES[options.device != "cpu"]
    settings: Any = itertools.product(shapes, options.dtypes, CUTS.items())
    for (R, V), name, (cut, keywords) in settings:
        dtype = getattr(torch, name)
        p = make_problem(R, V, dtype, options.device, keywords)
        exact = fastppo(p._replace(logits=p.logits.double(), uniform=p.uniform.double()), "reference")
        yield Case(
            op="sample",
            setting={"dtype": name, "cut": cut, "R": R, "V": V},
            variants=variants(p),
            truth={what: x.double() for what, x in exact.items()},
            tolerance=1e-5 if cut == "temperature" else 1e-4,  # which column is the last one kept may differ
            num_bytes=R * V * dtype.itemsize,
            tokens=R,
        )


def parser() -> argparse.ArgumentParser:
    made = arguments.parser(__doc__, repeats=9)
    made.add_argument("--shapes", type=arguments.sizes("R,V"), nargs="+", metavar="R,V")
    return made
