"""Log-probs (and entropies) from hidden states and the LM head: scoring without a gradient, and with it.

    fastppo bench kernels --ops token_logprobs [--shapes 1024,896,151936] [--out FILE]

Least operations: 2 R V H to score, 6 R V H with the gradients of hidden states and weight; what keeps no logits does
8 R V H, and that is fastppo, TRL and Liger. "one product" is the logits alone. Least bytes: hidden and weight read, and
with a gradient theirs written.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastppo.bench import arguments, harness
from fastppo.bench.harness import Case, Outputs, Variant
from fastppo.bench.ops.linear_ppo_loss import LIGER_SCALED, SHAPES, VERL
from fastppo.bench.problems import (
    ENTROPY_COEF,
    HeadProblem,
    Rows,
    gradients,
    grouped,
    head_problem,
    head_truth,
    leaf,
    liger_scaled,
    pick_head,
    spread,
    verl,
)
from fastppo_kernels import native, token_logprobs
from fastppo_kernels.linear import runs_native

Pair = tuple[Tensor, Tensor | None]
Score = Callable[[Tensor, Tensor, Rows], Pair]


def fastppo(hidden: Tensor, weight: Tensor, rows: Rows) -> Pair:
    if rows.entropy_coef:
        return token_logprobs(hidden, weight, rows.targets, return_entropy=True)
    return token_logprobs(hidden, weight, rows.targets), None


def eager(hidden: Tensor, weight: Tensor, rows: Rows) -> Pair:
    return from_logits((hidden @ weight.T).float(), rows)


def from_logits(logits: Tensor, rows: Rows) -> Pair:
    log_p = torch.log_softmax(logits, dim=-1)
    entropy = -(log_p.exp() * log_p).sum(-1) if rows.entropy_coef else None
    return log_p.gather(-1, rows.targets[:, None]).squeeze(-1), entropy


def trl(module: Any, hidden: Tensor, weight: Tensor, rows: Rows) -> Pair:
    outputs = ("entropy",) if rows.entropy_coef else ()
    function, chunk = module._ChunkedLogProbFunction, module._CHUNKED_LOGPROB_CHUNK_SIZE
    return function.apply(hidden, weight, None, rows.targets, 1.0, chunk, None, 1.0, outputs)[:2]


def liger(module: Any, hidden: Tensor, weight: Tensor, rows: Rows) -> Pair:
    chunk_forward = module.LigerFusedLinearPPOBase.chunk_forward
    return chunk_forward(grouped(hidden, rows), weight, grouped(rows.targets, rows)).flatten(), None


def objective(logprobs: Tensor, entropy: Tensor | None, rows: Rows) -> Tensor:
    """What is differentiated: a weighted sum, so that no loss is timed."""
    loss = (rows.advantages * rows.weights * logprobs).sum()
    return loss if entropy is None else loss + ENTROPY_COEF * (rows.weights * entropy).sum()


def run(p: HeadProblem, score: Score, gradient: bool) -> Outputs:
    if gradient:
        hidden, weight = leaf(p.hidden), leaf(p.weight)
        return gradients(objective(*score(hidden, weight, p.rows), p.rows), hidden=hidden, weight=weight)
    with torch.no_grad():
        logprobs, entropy = score(p.hidden, p.weight, p.rows)
    return {"logprobs": logprobs} | ({} if entropy is None else {"entropy": entropy})


def truth(p: HeadProblem, gradient: bool) -> Outputs:
    if gradient:
        return head_truth(p, lambda logits, rows: objective(*from_logits(logits, rows), rows))
    chosen = spread(p.hidden.shape[0])
    some = p._replace(hidden=p.hidden[chosen].double(), weight=p.weight.double(), rows=p.rows.take(chosen))
    return run(some, exact, False)


def exact(hidden: Tensor, weight: Tensor, rows: Rows) -> Pair:
    return from_logits(hidden @ weight.T, rows)


def one_product(hidden: Tensor, weight: Tensor) -> Outputs:
    return {"logits": (native.matmul if runs_native(hidden, weight) else torch.mm)(hidden, weight.T)}


def variants(p: HeadProblem, gradient: bool) -> dict[str, Variant | str]:
    on_cpu = p.hidden.device.type == "cpu"
    hidden, weight = (x.float() if on_cpu else x for x in (p.hidden, p.weight))

    def of(score: Score, note: str = "") -> Variant:
        """The peers multiply what they are given, on a CPU too."""
        dtype = None if score is fastppo else p.hidden.dtype
        return Variant(run=partial(run, p, score, gradient), dtype=dtype, note=note if gradient else "")

    liger_module = "liger_kernel.chunked_loss.fused_linear_ppo"
    made: dict[str, Variant | str] = {
        harness.OURS: of(fastppo, "8 R V H"),
        "torch eager": of(eager),
        "torch.compile": of(torch.compile(eager, dynamic=False)),
        "TRL 1.16 chunked": harness.peer("trl.trainer.utils", lambda m: of(partial(trl, m), "8 R V H")),
        "Liger scaled CE": harness.peer(LIGER_SCALED, lambda m: of(partial(liger_scaled, m), "8 R V H")),
        "verl FusedLinearForPPO": harness.peer(VERL, lambda m: of(partial(verl, m), "8 R V H")),
        "Liger chunk_forward": "has no entropy"
        if p.rows.entropy_coef
        else harness.peer(liger_module, lambda m: of(partial(liger, m), "8 R V H")),
    }
    if not gradient:
        made["one product"] = Variant(run=lambda: one_product(hidden, weight), truth={}, note="no log-prob")
    return made


def cases(options: Any) -> Iterator[Case]:
    shapes: Any = [(64, 64, 1000)] if options.quick else options.shapes or SHAPES[options.device != "cpu"]
    product_ = itertools.product(shapes, options.dtypes, options.entropy, options.gradient)
    for (R, H, V), name, entropy, gradient in product_:
        dtype = getattr(torch, name)
        p = head_problem(R, H, V, dtype, options.device, entropy)
        yield Case(
            op="token_logprobs",
            setting={"dtype": name, "entropy": entropy, "gradient": gradient, "R": R, "H": H, "V": V},
            variants=variants(p, gradient),
            truth=truth(p, gradient),
            tolerance=1e-5 if dtype == torch.float32 else 1e-2 if gradient else 1e-3,
            pick=pick_head if gradient else lambda outputs: {n: x[spread(len(x))] for n, x in outputs.items()},
            num_bytes=(1 + gradient) * (R * H + V * H) * dtype.itemsize,
            tokens=R,
            flops=(6 if gradient else 2) * R * V * H,
            dtype=torch.float32 if options.device == "cpu" else dtype,
        )


def parser() -> argparse.ArgumentParser:
    made = arguments.parser(__doc__, repeats=9)
    made.add_argument("--shapes", type=arguments.sizes("R,H,V"), nargs="+", metavar="R,H,V")
    made.add_argument("--gradient", type=arguments.boolean, nargs="+", default=[False, True])
    return made
