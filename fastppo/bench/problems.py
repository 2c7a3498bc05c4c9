"""The PPO problems of the row and head benchmarks: inputs, the float64 truth, and what a trainer writes in PyTorch.

Clip range 0.2, no KL term, weights 1/R, and with `entropy` a bonus of 0.01 that has a gradient. Advantages are equal
within each of 8 sequences, because Liger takes one per sequence; no other variant makes use of that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastppo.bench.harness import Outputs
from fastppo_kernels import token_logprobs

CLIP = 0.2
ENTROPY_COEF = 0.01
SEQUENCES = 8
SAMPLE = 64  # rows of logits, and of the weight, whose gradients are compared with float64, and a few more
SOURCE_ROWS = 64  # different rows of logits


class Rows(NamedTuple):
    """Constants of R rows, (R,) each; entropy_coef is 0 or ENTROPY_COEF."""

    targets: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    entropy_coef: float

    @property
    def sequences(self) -> tuple[int, int]:
        return SEQUENCES, self.targets.shape[0] // SEQUENCES

    def take(self, rows: slice) -> Rows:
        targets, old, advantages, weights = (x[rows] for x in self[:4])
        return Rows(targets, old, advantages, weights, self.entropy_coef)


class HeadProblem(NamedTuple):
    """Hidden states and an LM head."""

    hidden: Tensor  # (R, H)
    weight: Tensor  # (V, H)
    rows: Rows

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.hidden.shape[0], self.hidden.shape[1], self.weight.shape[0]


class LogitsProblem(NamedTuple):
    """Logits, and the rows they are filled with again and again."""

    source: Tensor  # (SOURCE_ROWS, V)
    logits: Tensor  # (R, V)
    rows: Rows

    def refill(self) -> None:
        """The logits as they were before a gradient was written over them."""
        fill(self.logits, self.source)


def fill(logits: Tensor, source: Tensor) -> None:
    for start in range(0, logits.shape[0], SOURCE_ROWS):
        some = logits[start : start + SOURCE_ROWS]
        some.copy_(source[: some.shape[0]])


def make_rows(logprobs: Tensor, targets: Tensor, entropy: bool) -> Rows:
    """Rows whose old log-probs lie 0.2 around `logprobs`, so that some ratios are clipped."""
    num_rows, device = targets.shape[0], targets.device
    advantages = torch.randn(SEQUENCES, device=device).repeat_interleave(num_rows // SEQUENCES)
    old = logprobs.float() + 0.2 * torch.randn(num_rows, device=device)
    weights = torch.full((num_rows,), 1.0 / num_rows, device=device)
    return Rows(targets, old, advantages, weights, ENTROPY_COEF if entropy else 0.0)


def head_problem(R: int, H: int, V: int, dtype: torch.dtype, device: str, entropy: bool) -> HeadProblem:
    """Logits of standard deviation 2."""
    hidden = torch.randn(R, H, device=device).to(dtype)
    weight = torch.randn(V, H, device=device).mul_(2 / H**0.5).to(dtype)
    targets = torch.randint(V, (R,), device=device)
    with torch.no_grad():
        logprobs = token_logprobs(hidden, weight, targets)
    return HeadProblem(hidden, weight, make_rows(logprobs, targets, entropy))


def logits_problem(R: int, V: int, dtype: torch.dtype, device: str, entropy: bool) -> LogitsProblem:
    source = torch.randn(SOURCE_ROWS, V, device=device).mul_(2).to(dtype)
    targets = torch.randint(V, (R,), device=device)
    logprobs = source.float().log_softmax(1)[torch.arange(R, device=device) % SOURCE_ROWS, targets]
    logits = torch.empty(R, V, dtype=dtype, device=device)
    fill(logits, source)
    return LogitsProblem(source, logits, make_rows(logprobs, targets, entropy))


def policy_loss(logprobs: Tensor, entropy: Tensor | None, rows: Rows) -> Tensor:
    """The objective from log-probs, as trainers write it."""
    ratio = (logprobs - rows.old_logprobs).exp()
    loss = torch.maximum(-rows.advantages * ratio, -rows.advantages * ratio.clamp(1 - CLIP, 1 + CLIP))
    if entropy is not None:
        loss = loss - rows.entropy_coef * entropy
    return (rows.weights * loss).sum()


def rows_loss(logits: Tensor, rows: Rows) -> Tensor:
    """The objective from logits, in float32 at least: log_softmax, gather, loss."""
    log_p = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
    picked = log_p.gather(-1, rows.targets[:, None]).squeeze(-1)
    return policy_loss(picked, -(log_p.exp() * log_p).sum(-1) if rows.entropy_coef else None, rows)


def head_loss(hidden: Tensor, weight: Tensor, rows: Rows) -> Tensor:
    return rows_loss(hidden @ weight.T, rows)


def spread(n: int) -> slice:
    """SAMPLE or some more indices of range(n), as far apart as can be, the last one among them."""
    step = max(1, n // SAMPLE)
    return slice((n - 1) % step, None, step)


def logits_truth(p: LogitsProblem) -> Outputs:
    """In float64 the loss, the gradient of the rows in `spread`, and the sum of the gradients of all rows."""
    R, V = p.logits.shape
    chosen = torch.arange(R)[spread(R)]
    loss, total = p.source.new_zeros((), dtype=torch.float64), p.source.new_zeros(V, dtype=torch.float64)
    gradients_ = []
    for start in range(0, R, SOURCE_ROWS):
        some = p.rows.take(slice(start, start + SOURCE_ROWS))
        leaf_ = leaf(p.source[: some.targets.shape[0]].double())
        part = rows_loss(leaf_, some)
        (gradient,) = torch.autograd.grad(part, leaf_)
        loss, total = loss + part.detach(), total + gradient.sum(0)
        gradients_.append(gradient[_within(chosen, start, SOURCE_ROWS)])
    return {"loss": loss, "dlogits": torch.cat(gradients_), "dlogits_sum": total}


def pick_logits(outputs: Outputs) -> Outputs:
    """What `logits_truth` has."""
    dlogits = outputs["dlogits"]
    total = dlogits.sum(0, dtype=torch.float64)
    return {"loss": outputs["loss"], "dlogits": dlogits[spread(dlogits.shape[0])], "dlogits_sum": total}


def head_truth(p: HeadProblem, loss: Callable[[Tensor, Rows], Tensor] = rows_loss) -> Outputs:
    """The loss, dhidden of all rows and dweight of the tokens in `spread`, to which all rows contribute, in float64."""
    R, _, V = p.shape
    weight, total = p.weight.double(), p.weight.new_zeros((), dtype=torch.float64)
    dweight, dhidden = torch.zeros_like(weight[spread(V)]), []
    for start in range(0, R, SAMPLE):
        some = slice(start, start + SAMPLE)
        hidden = p.hidden[some].double()
        logits = (hidden @ weight.T).requires_grad_()
        part = loss(logits, p.rows.take(some))
        (dlogits,) = torch.autograd.grad(part, logits)
        total += part.detach()
        dweight += dlogits[:, spread(V)].T @ hidden
        dhidden.append(dlogits @ weight)
    return {"loss": total, "dhidden": torch.cat(dhidden), "dweight": dweight}


def pick_head(outputs: Outputs) -> Outputs:
    """What `head_truth` has."""
    return {**outputs, "dweight": outputs["dweight"][spread(len(outputs["dweight"]))]}


def _within(chosen: Tensor, start: int, length: int) -> list[int]:
    """Those of the rows `chosen` in start .. start + length - 1, counted from `start`."""
    return [i - start for i in chosen.tolist() if start <= i < start + length]


def liger_scaled(module: Any, hidden: Tensor, weight: Tensor, rows: Rows) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropies of Liger's fused scaled cross-entropy.

    A kernel of its own on Hopper; elsewhere verl's formulas in PyTorch, by chunks of 512 rows.
    """
    function, wanted = module.LigerFusedLinearScaledCrossEntropyFunction, rows.entropy_coef != 0
    made = function.apply(hidden, weight, rows.targets, return_entropy=wanted)
    return (-made[0], made[1]) if wanted else (-made, None)


def verl(module: Any, hidden: Tensor, weight: Tensor, rows: Rows) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropies of verl's chunked head; it makes both in any case."""
    logprobs, entropy = module.FusedLinearForPPO()(hidden, weight, rows.targets)
    return logprobs, entropy if rows.entropy_coef else None


def grouped(x: Tensor, rows: Rows) -> Tensor:
    """(R, ...) as (B, T, ...), for peers that take sequences."""
    return x.view(*rows.sequences, *x.shape[1:])


def per_sequence(x: Tensor, rows: Rows) -> Tensor:
    """(R,) of equal numbers within a sequence as (B,)."""
    return grouped(x, rows)[:, 0].contiguous()


def gradients(loss: Tensor, **leaves: Tensor) -> dict[str, Tensor]:
    """The loss and its gradients, named d<leaf>."""
    made = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach(), **{f"d{name}": g for name, g in zip(leaves, made, strict=True)}}


def leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()
