"""The PPO loss from hidden states and the LM head, with both gradients: fastppo against peers and its own products.

    fastppo bench kernels --ops linear_ppo_loss [--shapes 1024,896,151936] [--out FILE]

Least operations: three products of 2 * R * V * H each (logits, gradient of hidden, gradient of the weight); peers that
make the logits again in the backward do 8 R V H. "three products" are those alone, with the operands and the library
that the op uses on this device, on whole matrices and by chunks of rows as the op goes: compare with the faster of the
two. Least bytes: hidden and weight read, their gradients written.
`extra MB` is to be compared with one chunk of logits and the weight's gradient in float32, which each record states.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastppo.bench import arguments, harness
from fastppo.bench.harness import Case, Outputs, Variant
from fastppo.bench.problems import (
    CLIP,
    HeadProblem,
    Rows,
    gradients,
    grouped,
    head_loss,
    head_problem,
    head_truth,
    leaf,
    liger_scaled,
    per_sequence,
    pick_head,
    policy_loss,
    verl,
)
from fastppo_kernels import linear_ppo_loss, native
from fastppo_kernels.head import default_chunk_size
from fastppo_kernels.linear import runs_native

LIGER, LIGER_SCALED = "liger_kernel.chunked_loss", "liger_kernel.ops.fused_linear_scaled_cross_entropy"
VERL, VERL_KERNEL = "verl.utils.experimental.torch_functional", "verl.utils.kernel.linear_cross_entropy"
AGILERL = "agilerl.algorithms.core.llm_ops.fused_loss"
Score = Callable[[Tensor, Tensor, Rows], tuple[Tensor, Tensor | None]]  # log-probs and entropies
SHAPES = (  # CPU, GPU
    [(1024, 128, 32000), (1024, 896, 32000), (1024, 128, 151936), (1024, 896, 151936)],
    [(8192, 4096, 128256), (16384, 896, 151936)],
)


def fastppo(p: HeadProblem) -> Outputs:
    hidden, weight = leaf(p.hidden), leaf(p.weight)
    loss, _ = linear_ppo_loss(hidden, weight, *p.rows[:4], entropy_coef=p.rows.entropy_coef)
    return gradients(loss, hidden=hidden, weight=weight)


def by_autograd(p: HeadProblem, loss: Any) -> Outputs:
    hidden, weight = leaf(p.hidden), leaf(p.weight)
    return gradients(loss(hidden, weight, p.rows), hidden=hidden, weight=weight)


def whole_products(hidden: Tensor, weight: Tensor) -> Outputs:
    """The products of the op with logits in place of their gradient; (R, V) is new memory on every call."""
    matmul = native.matmul if runs_native(hidden, weight) else torch.mm
    logits = matmul(hidden, weight.T)
    return {"dhidden": matmul(logits, weight), "dweight": matmul(logits.T, hidden)}


def chunked_products(hidden: Tensor, weight: Tensor, chunk: int) -> Outputs:
    """The same a chunk of rows at a time."""
    dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight)
    logits = hidden.new_empty(chunk, weight.shape[0])
    for x, dx in zip(hidden.split(chunk), dhidden.split(chunk), strict=True):
        made = logits[: len(x)]
        if runs_native(hidden, weight):
            native.matmul(x, weight.T, out=made)
            native.matmul(made, weight, out=dx)
            native.matmul(made.T, x, out=dweight, accumulate=True)
        else:
            torch.mm(x, weight.T, out=made)
            torch.mm(made, weight, out=dx)
            dweight.addmm_(made.T, x)
    return {"dhidden": dhidden, "dweight": dweight}


def trl_loss(module: Any, hidden: Tensor, weight: Tensor, rows: Rows) -> Tensor:
    """TRL's chunked log-probs, with the chunk its trainers use, under the same loss."""
    outputs = ("entropy",) if rows.entropy_coef else ()
    function, chunk = module._ChunkedLogProbFunction, module._CHUNKED_LOGPROB_CHUNK_SIZE
    made = function.apply(hidden, weight, None, rows.targets, 1.0, chunk, None, 1.0, outputs)
    return policy_loss(made[0], made[1], rows)


def scored_loss(score: Score, hidden: Tensor, weight: Tensor, rows: Rows) -> Tensor:
    logprobs, entropy = score(hidden, weight, rows)
    return policy_loss(logprobs, entropy, rows)


def liger(p: HeadProblem, loss_module: Any) -> Outputs:
    hidden, weight = leaf(p.hidden), leaf(p.weight)
    x, ids, old = (grouped(t, p.rows) for t in (hidden, p.rows.targets, p.rows.old_logprobs))
    mask, advantages = torch.ones_like(old), per_sequence(p.rows.advantages, p.rows)
    loss, _ = loss_module(x, weight, ids, mask, advantages, old_per_token_logps=old)
    return gradients(loss, hidden=hidden, weight=weight)


def liger_variant(p: HeadProblem, compiled: bool, module: Any) -> Variant:
    """All sequences in one chunk of Liger's, which is the quickest: its own tiles bound the memory."""
    options = {"beta": 0.0, "use_ref_model": False, "epsilon_low": CLIP, "epsilon_high": CLIP, "loss_type": "bnpo"}
    loss = module.LigerFusedLinearGRPOLoss(compiled=compiled, chunk_size=p.rows.sequences[0], **options)
    return Variant(run=lambda: liger(p, loss), dtype=p.hidden.dtype, note="advantages per sequence")


def verl_kernel(module: Any, hidden: Tensor, weight: Tensor, rows: Rows) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropies of verl's Triton kernel; it makes both in any case."""
    logprobs, entropy = module.linear_cross_entropy(hidden, weight, rows.targets, 1.0, "none")
    return logprobs, entropy if rows.entropy_coef else None


def agilerl_loss(module: Any, hidden: Tensor, weight: Tensor, rows: Rows) -> Tensor:
    """AgileRL's fused loss with an advantage per token, built on Liger's chunks; its default chunk."""
    mask = torch.ones_like(rows.advantages)
    given = (grouped(x, rows) for x in (rows.targets, mask, rows.advantages))
    options = {"beta": 0.0, "epsilon_low": CLIP, "epsilon_high": CLIP, "temperature": 1.0}
    old = grouped(rows.old_logprobs, rows)
    return module.apply_fused_policy_loss(
        grouped(hidden, rows), weight, None, *given, None, old, importance_sampling_level="token", **options
    )[0]


def cross_entropy(hidden: Tensor, weight: Tensor, rows: Rows) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, rows.targets, options=options)


def mean_cross_entropy(logits: Tensor, rows: Rows) -> Tensor:
    return (F.cross_entropy(logits, rows.targets, reduction="none") * rows.weights).sum()


def variants(p: HeadProblem) -> dict[str, Variant | str]:
    on_cpu = p.hidden.device.type == "cpu"
    hidden, weight = (x.float() if on_cpu else x for x in (p.hidden, p.weight))
    chunk = default_chunk_size(weight.shape[0], weight.shape[1], hidden.device)

    def whole(loss: Any, note: str = "") -> Variant:
        """A peer's loss; the peers multiply what they are given, on a CPU too."""
        return Variant(run=partial(by_autograd, p, loss), dtype=p.hidden.dtype, note=note)

    def of(score: Score) -> Variant:
        """A peer that makes log-probs, under the same loss as the others."""
        return whole(partial(scored_loss, score), "8 R V H")

    no_entropy = "has no entropy" if p.rows.entropy_coef else ""
    made: dict[str, Variant | str] = {
        harness.OURS: Variant(run=lambda: fastppo(p)),
        "three products, whole": Variant(run=lambda: whole_products(hidden, weight), truth={}, note="no loss"),
        "three products, chunks": Variant(
            run=lambda: chunked_products(hidden, weight, chunk), truth={}, note="no loss"
        ),
        "torch eager": whole(head_loss),
        "torch.compile": whole(torch.compile(head_loss, dynamic=False)),
        "TRL 1.16 chunked": harness.peer("trl.trainer.utils", lambda m: whole(partial(trl_loss, m), "8 R V H")),
        "Liger scaled CE": harness.peer(LIGER_SCALED, lambda m: of(partial(liger_scaled, m))),
        "verl FusedLinearForPPO": harness.peer(VERL, lambda m: of(partial(verl, m))),
        "verl kernel": ("Triton: needs a GPU" if on_cpu else "")
        or harness.peer(VERL_KERNEL, lambda m: of(partial(verl_kernel, m))),
        "AgileRL fused": no_entropy or harness.peer(AGILERL, lambda m: whole(partial(agilerl_loss, m))),
        "Liger GRPO": no_entropy or harness.peer(LIGER, partial(liger_variant, p, False)),
        "Liger GRPO compiled": no_entropy or harness.peer(LIGER, partial(liger_variant, p, True)),
        "torch linear_cross_entropy": "cross-entropy only" if no_entropy else "not in this torch",
    }
    if not no_entropy and hasattr(F, "linear_cross_entropy"):
        made["torch linear_cross_entropy"] = Variant(
            run=lambda: by_autograd(p, cross_entropy),
            truth=head_truth(p, mean_cross_entropy),
            dtype=p.hidden.dtype,
            note="cross-entropy, no PPO",
        )
    return made


def cases(options: Any) -> Iterator[Case]:
    shapes: Any = [(64, 64, 1000)] if options.quick else options.shapes or SHAPES[options.device != "cpu"]
    for (R, H, V), name, entropy in itertools.product(shapes, options.dtypes, options.entropy):
        dtype = getattr(torch, name)
        p = head_problem(R, H, V, dtype, options.device, entropy)
        chunk = min(R, default_chunk_size(V, H, p.hidden.device)) * V * 4
        yield Case(
            op="linear_ppo_loss",
            setting={"dtype": name, "entropy": entropy, "R": R, "H": H, "V": V},
            facts={"chunk_mb": round(chunk / 2**20, 1), "dweight_float32_mb": round(V * H * 4 / 2**20, 1)},
            variants=variants(p),
            truth=head_truth(p),
            tolerance=1e-5 if dtype == torch.float32 else 1e-2,
            pick=pick_head,
            num_bytes=2 * (R * H + V * H) * dtype.itemsize,
            tokens=R,
            flops=6 * R * V * H,
            dtype=torch.float32 if options.device == "cpu" else dtype,  # bfloat16 is multiplied in float32 on the CPU
        )


def parser() -> argparse.ArgumentParser:
    made = arguments.parser(__doc__, repeats=9)
    made.add_argument("--shapes", type=arguments.sizes("R,H,V"), nargs="+", metavar="R,H,V")
    return made
