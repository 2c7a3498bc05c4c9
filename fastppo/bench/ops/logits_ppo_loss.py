"""The PPO loss and its gradient from logits: fastppo's one pass against PyTorch, torch.compile, TRL, Liger, flash-attn.

    fastppo bench kernels --ops logits_ppo_loss [--shapes 1024,151936] [--out FILE]

Least bytes: every logit read once and its gradient written once, 2 * R * V * itemsize. fastppo writes the gradient over
the logits, which are restored, untimed, before each call; "copy" reads and writes as many bytes and computes nothing.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastppo.bench import arguments, harness
from fastppo.bench.harness import Case, Outputs, Variant
from fastppo.bench.problems import (
    CLIP,
    LogitsProblem,
    fill,
    gradients,
    grouped,
    leaf,
    logits_problem,
    logits_truth,
    per_sequence,
    pick_logits,
    policy_loss,
    rows_loss,
)
from fastppo_kernels import logits_ppo_loss

LIGER, FLASH = "liger_kernel.transformers.grpo_loss", "flash_attn.ops.triton.cross_entropy"
SHAPES = [(1024, 32000), (1024, 151936)], [(8192, 128256), (16384, 151936)]  # CPU, GPU


class _Output(torch.autograd.Function):
    """Logits as a model gives them: neither a leaf nor a view of one, and here without a copy."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def fastppo(p: LogitsProblem) -> Outputs:
    logits = leaf(p.logits)
    loss, _ = logits_ppo_loss(_Output.apply(logits), *p.rows[:4], entropy_coef=p.rows.entropy_coef, inplace=True)
    return gradients(loss, logits=logits)


def by_autograd(p: LogitsProblem, loss: Any) -> Outputs:
    logits = leaf(p.logits)
    return gradients(loss(logits, p.rows), logits=logits)


def trl(p: LogitsProblem, utils: Any) -> Outputs:
    """TRL's log-probs (and entropy), Triton kernels on a GPU, under the same loss."""
    logits = leaf(p.logits)
    if p.rows.entropy_coef:
        logprobs, entropy = utils.selective_log_softmax_and_entropy(logits, p.rows.targets)
        loss = policy_loss(logprobs, entropy, p.rows)
    else:
        loss = policy_loss(utils.selective_log_softmax(logits, p.rows.targets), None, p.rows)
    return gradients(loss, logits=logits)


def flash(p: LogitsProblem, module: Any) -> Outputs:
    logits = leaf(p.logits)
    losses = module.cross_entropy_loss(logits, p.rows.targets, inplace_backward=True)[0]
    return gradients(policy_loss(-losses, None, p.rows), logits=logits)


def liger(p: LogitsProblem, padded: Tensor, module: Any) -> Outputs:
    """Liger's takes (B, T + 1, V) and leaves the last position of each sequence out."""
    ids, old, logits = grouped(p.rows.targets, p.rows), grouped(p.rows.old_logprobs, p.rows), leaf(padded)
    advantages = per_sequence(p.rows.advantages, p.rows)
    options = {"temperature": 1.0, "beta": 0.0, "eps_low": CLIP, "eps_high": CLIP, "loss_type": "bnpo", "reduce": True}
    loss, _ = module.triton_grpo_loss(logits, old, None, ids, advantages, inplace=True, **options)
    return gradients(loss, logits=logits)


def variants(p: LogitsProblem) -> dict[str, Variant | str]:
    compiled, other = torch.compile(rows_loss, dynamic=False), torch.empty_like(p.logits)

    def of(run: Any, *arguments: Any, note: str = "") -> Variant:
        return Variant(run=lambda: run(p, *arguments), before=p.refill, note=note)

    made: dict[str, Variant | str] = {
        harness.OURS: of(fastppo),
        "copy": Variant(run=lambda: {"x": other.copy_(p.logits)}, truth={}, note="same bytes, no result"),
        "torch eager": of(by_autograd, rows_loss),
        "torch.compile": of(by_autograd, compiled),
        "TRL 1.16": harness.peer("trl.trainer.utils", lambda m: of(trl, m)),
    }
    cannot = "needs a GPU" if p.logits.device.type == "cpu" else "has no entropy" if p.rows.entropy_coef else None
    made["Liger Triton GRPO"] = cannot or harness.peer(LIGER, lambda m: liger_variant(p, m))
    made["flash-attn"] = cannot or harness.peer(FLASH, lambda m: of(flash, m, note="the loss in torch"))
    return made


def liger_variant(p: LogitsProblem, module: Any) -> Variant:
    sequences, length = p.rows.sequences
    padded = p.logits.new_zeros(sequences, length + 1, p.logits.shape[1])

    def refill() -> None:
        for b, sequence in enumerate(grouped(p.logits, p.rows)):
            padded[b, :length].copy_(sequence)

    def pick(outputs: Outputs) -> Outputs:
        return pick_logits({"loss": outputs["loss"], "dlogits": outputs["dlogits"][:, :length].flatten(0, 1)})

    def before() -> None:
        fill(p.logits, p.source)
        refill()

    return Variant(run=lambda: liger(p, padded, module), before=before, pick=pick, note="advantages per sequence")


def cases(options: Any) -> Iterator[Case]:
    shapes: Any = [(64, 1000)] if options.quick else options.shapes or SHAPES[options.device != "cpu"]
    for (R, V), name, entropy in itertools.product(shapes, options.dtypes, options.entropy):
        dtype = getattr(torch, name)
        p = logits_problem(R, V, dtype, options.device, entropy)
        yield Case(
            op="logits_ppo_loss",
            setting={"dtype": name, "entropy": entropy, "R": R, "V": V},
            variants=variants(p),
            truth=logits_truth(p),
            tolerance=1e-5 if dtype == torch.float32 else 1e-2,
            pick=pick_logits,
            num_bytes=2 * R * V * dtype.itemsize,
            tokens=R,
        )


def parser() -> argparse.ArgumentParser:
    made = arguments.parser(__doc__)
    made.add_argument("--shapes", type=arguments.sizes("R,V"), nargs="+", metavar="R,V")
    return made
