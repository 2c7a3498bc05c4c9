"""The PPO losses whose gradient is made in the forward: nothing is recomputed, backward only scales by grad_output.

Per chunk of rows: logits -> softmax in place -> the scalar objective of those rows and its derivative with respect to
log-prob and entropy (`reference.ppo_objective`) -> dlogits in place -> products. 6 R V H operations in all.
"""

from typing import Any

import torch
from torch import Tensor

from fastppo_kernels import reference
from fastppo_kernels.head import ChunkedHead, default_chunk_size, dlogits_, softmax_
from fastppo_kernels.reference import PPORows
from fastppo_kernels.settings import HeadSettings, PPOSettings


def row_gradients(
    logprobs: Tensor, entropy: Tensor | None, rows: PPORows, settings: PPOSettings
) -> tuple[Tensor, Tensor | None]:
    """d loss / d log-prob and d loss / d entropy (None where it is 0) of cleaned rows, (C,) each."""
    with torch.enable_grad():
        leaf = logprobs.detach().requires_grad_()
        loss, _ = reference.ppo_objective(leaf, None, rows, settings)
        (dlogprobs,) = torch.autograd.grad(loss, leaf)
    dentropy = -settings.entropy_coef * rows.weights if entropy is not None and settings.entropy_coef else None
    return dlogprobs, dentropy


class LinearPPO(torch.autograd.Function):
    """Loss from hidden states. Returns (loss, log-probs, entropies or (0,)); the last two carry no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (R, H); every row has a weight, or is finite
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (R,)
        rows: PPORows,
        settings: PPOSettings,
        head: HeadSettings,
        options: dict[str, Any],  # chunk_size, logits_dtype, entropy, grad
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = tuple(need and options["grad"] for need in ctx.needs_input_grad[:3])
        logprobs = torch.empty(hidden.shape[0], dtype=reference.working_dtype(hidden), device=hidden.device)
        entropies = torch.empty_like(logprobs) if options["entropy"] else logprobs.new_empty(0)
        rows = rows.cleaned(rows.weights != 0, logprobs.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            chunked = ChunkedHead(
                hidden,
                weight,
                bias,
                head,
                chunk_size=options["chunk_size"],
                logits_dtype=options["logits_dtype"],
                wanted=wanted,
            )
            for some in chunked.chunks():
                chunk = chunked.softmax(some, targets, entropy=options["entropy"])
                logprobs[some] = chunk.logprobs
                if chunk.entropy is not None:
                    entropies[some] = chunk.entropy
                if any(wanted):
                    grads = row_gradients(chunk.logprobs, chunk.entropy, rows.take(some), settings)
                    chunked.accumulate(some, *dlogits_(chunk, targets[some], *grads, head))
        ctx.save_for_backward(chunked.dhidden, chunked.dweight, chunked.dbias)
        ctx.dtypes = (hidden.dtype, weight.dtype, bias.dtype if bias is not None else None)
        ctx.mark_non_differentiable(logprobs, entropies)
        return reference.ppo_loss(logprobs, rows, settings, entropies if options["entropy"] else None)[0], *(
            logprobs,
            entropies,
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (
            None
            if made is None
            else torch.mul(made, grads[0], out=torch.empty(made.shape, dtype=dtype, device=made.device))
            for made, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *scaled, None, None, None, None, None


class LogitsPPO(torch.autograd.Function):
    """Loss from logits; dlogits go over the logits when `inplace`, else to a buffer of their own."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,  # (R, V)
        targets: Tensor,  # (R,)
        rows: PPORows,
        settings: PPOSettings,
        head: HeadSettings,
        options: dict[str, Any],  # inplace, entropy, grad
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_rows, vocab_size = logits.shape
        logprobs = torch.zeros(num_rows, dtype=reference.working_dtype(logits), device=logits.device)
        entropies = torch.zeros_like(logprobs) if options["entropy"] else logprobs.new_empty(0)
        live = rows.weights != 0
        rows, targets = rows.cleaned(live, logprobs.dtype), torch.where(live, targets, 0)
        dlogits = None
        if options["grad"]:
            dlogits = logits.detach() if options["inplace"] else torch.empty_like(logits)
        size = default_chunk_size(vocab_size, logits.device)
        for some in (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)):
            z = torch.where(live[some, None], logits[some], 0).to(logprobs.dtype)
            chunk = softmax_(z, targets[some], head, entropy=options["entropy"], temperature_done=False)
            logprobs[some] = chunk.logprobs
            if chunk.entropy is not None:
                entropies[some] = chunk.entropy
            if dlogits is not None:
                grads = row_gradients(chunk.logprobs, chunk.entropy, rows.take(some), settings)
                d, scale = dlogits_(chunk, targets[some], *grads, head)
                scale = torch.where(live[some], scale, 0)
                torch.mul(d, scale[:, None], out=dlogits[some])
        ctx.save_for_backward(dlogits)
        ctx.inplace, ctx.spent = options["inplace"], False
        ctx.mark_non_differentiable(logprobs, entropies)
        loss, _ = reference.ppo_loss(logprobs, rows, settings, entropies if options["entropy"] else None)
        return loss, logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.inplace and ctx.spent:
            raise RuntimeError(
                "logits_ppo_loss(inplace=True) can be differentiated once: its gradient was scaled where it lay. "
                "Pass inplace=False to call backward again."
            )
        (dlogits,) = ctx.saved_tensors
        ctx.spent = True
        scaled = dlogits.mul_(grads[0]) if ctx.inplace else dlogits * grads[0]
        return scaled, None, None, None, None, None
