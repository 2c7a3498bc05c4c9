"""The LM head split over ranks by vocabulary: 16 bytes a row are gathered, and every rank combines them in rank order.

Rank r holds rows [r V', (r + 1) V') of the weight and all hidden states. Of its logits z it tells the others the
largest m, log s = log sum exp(z - m), its entropy H_r and the target's logit if the target is its own. Then

    w_r = exp(m_r - M + log s_r) / sum of the same over ranks       log p_y = (z_y - M) - log(that sum)
    H   = sum_r w_r (H_r - log w_r)

and the gradient for d log p_y = c, dH = e of its logits, with q its own softmax, p = w q, is the one-rank gradient for

    c' = w (c + e (log w + H - H_r))        e' = w e        and any own column, where c or 0 replaces c'.

Collectives are called between the products, so these are autograd Functions, not operators of torch.library:
torch.compile has to leave them out.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastppo_kernels import backend as backends
from fastppo_kernels import operators
from fastppo_kernels.head import ChunkedHead, exact_products
from fastppo_kernels.reference import PPORows, working_dtype
from fastppo_kernels.settings import HeadSettings, PPOSettings
from fastppo_kernels.table import PPO_COLUMNS, with_sums

DLOGPROB = PPO_COLUMNS.index("dlogprob")


class Combined(NamedTuple):
    """A chunk of C rows over all ranks, and what this rank needs for its part of the gradient; (C,) each."""

    logprobs: Tensor
    entropy: Tensor  # 0 where it was not asked for, as is the next
    own_entropy: Tensor
    log_mass: Tensor  # log w of this rank
    column: Tensor  # int64, the target's own column, or any where it is another rank's
    is_own: Tensor  # bool
    slope: Tensor  # d z / d logit at that column
    empty: Tensor  # bool: all own columns are masked


def combine(
    logits: Tensor, targets: Tensor, head: HeadSettings, module: ModuleType, group: Any, *, entropy: bool
) -> Combined:
    """Log-probs and entropies of a chunk of logits (C, V') over the ranks of `group`."""
    column = targets - dist.get_rank(group) * logits.shape[1]
    is_own = (column >= 0) & (column < logits.shape[1])
    column = torch.where(is_own, column, 0)
    top, place = logits.max(1)
    empty = top == -torch.inf
    log_top, own = module.logprob_rows(logits, place, head, entropy=entropy)
    own = torch.zeros_like(log_top) if own is None else torch.where(empty, 0, own)
    at_target, slope = _capped(logits.gather(1, column[:, None]).squeeze(1), head)
    mine = torch.stack([_capped(top, head)[0], torch.where(empty, 0, -log_top), own, at_target], 1)
    mine[:, 3].masked_fill_(~is_own, -torch.inf)
    everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyones, mine, group=group)
    m, log_s, entropies, z = torch.stack(everyones).unbind(2)  # (ranks, C) each
    overall = m.amax(0)
    log_masses = (m - overall) / head.temperature + log_s
    log_sum = torch.logsumexp(log_masses, 0)
    log_w = log_masses - log_sum
    finite = torch.where(log_w > -torch.inf, log_w, 0)
    return Combined(
        (z.amax(0) - overall) / head.temperature - log_sum,
        (log_w.exp() * (entropies - finite)).sum(0) if entropy else own,
        mine[:, 2],
        finite[dist.get_rank(group)],
        column,
        is_own,
        slope,
        empty,
    )


def backward(
    logits: Tensor,
    found: Combined,
    dlogprobs: Tensor,
    dentropy: Tensor | None,
    head: HeadSettings,
    module: ModuleType,
    *,
    dlogits: Tensor,
) -> None:
    """Writes this rank's part of the gradient over the logits it came from."""
    w = found.log_mass.exp()
    c, e = w * dlogprobs, None
    if dentropy is not None:
        e = w * dentropy
        c = c + e * (found.log_mass + found.entropy - found.own_entropy)
    module.logprob_rows_backward(logits, found.column, c, e, head, dlogits=dlogits)
    correction = (torch.where(found.is_own, dlogprobs, 0) - c) * found.slope
    at_column = dlogits.gather(1, found.column[:, None]).squeeze(1).to(c.dtype) + correction
    dlogits.scatter_(1, found.column[:, None], at_column[:, None].to(dlogits.dtype))
    dlogits.masked_fill_(found.empty[:, None], 0)


def _capped(z: Tensor, head: HeadSettings) -> tuple[Tensor, Tensor]:
    """Soft-capped logits, not yet divided by the temperature, and d z / d logit with it."""
    if head.softcap is None:
        return z, torch.full_like(z, 1.0 / head.temperature)
    bent = torch.tanh(z / head.softcap)
    return head.softcap * bent, (1.0 - bent.square()) / head.temperature


class TokenLogprobs(torch.autograd.Function):
    """(log-probs, entropies) over the group; the backward makes each chunk, and its gathering, again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: HeadSettings,
        entropy: bool,
        chunk_size: int | None,
        backend: str,
        group: Any,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.settings, module = (head, entropy, chunk_size, backend, group), backends.load(backend)
        chunked = ChunkedHead(hidden, weight, bias, chunk_size=chunk_size, backend=backend)
        with exact_products(hidden):
            parts = [
                combine(chunked.logits(rows), targets[rows], head, module, group, entropy=entropy)[:2]
                for rows in chunked.chunks()
            ]
        nothing = hidden.new_empty(0, dtype=working_dtype(hidden))
        logprobs, entropies = zip(*parts, strict=True) if parts else ((nothing,), (nothing,))
        return torch.cat(logprobs), torch.cat(entropies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        head, entropy, chunk_size, backend, group = ctx.settings
        module, wanted = backends.load(backend), ctx.needs_input_grad[:3]
        chunked = ChunkedHead(hidden, weight, bias, chunk_size=chunk_size, backend=backend, wanted=wanted)
        with exact_products(hidden):
            for rows in chunked.chunks():
                logits = chunked.logits(rows)
                found = combine(logits, targets[rows], head, module, group, entropy=entropy)
                dlogits = chunked.dlogits(logits)
                dlogprobs, dentropy = (g[rows].contiguous() for g in grads)
                slopes = (dlogprobs, dentropy if entropy else None)
                backward(logits, found, *slopes, head, module, dlogits=dlogits)
                chunked.accumulate(rows)
                del logits, dlogits, found  # before the next chunk's are made
        return *_gradients(chunked, (hidden, weight, bias), wanted, group), *[None] * 6


class LinearPPO(torch.autograd.Function):
    """(loss, sums of the PPO table) over the group, the gradient made along with it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: PPORows,
        settings: PPOSettings,
        head: HeadSettings,
        entropy: bool,
        chunk_size: int | None,
        backend: str,
        group: Any,
    ) -> tuple[Tensor, Tensor]:
        module, wanted, dtype = backends.load(backend), ctx.needs_input_grad[:3], working_dtype(hidden)
        live = rows.weights != 0
        rows, targets = rows.cleaned(live, dtype), torch.where(live, targets, 0)
        x = torch.where(live[:, None], hidden, 0)
        chunked = ChunkedHead(x, weight, bias, chunk_size=chunk_size, backend=backend, wanted=wanted)
        table = torch.empty(x.shape[0], len(PPO_COLUMNS), dtype=dtype, device=x.device)
        with exact_products(hidden):
            for some in chunked.chunks():
                logits, of_chunk = chunked.logits(some), rows.take(some)
                found = combine(logits, targets[some], head, module, group, entropy=entropy)
                table[some] = module.ppo_tokens(found.logprobs, found.entropy, of_chunk, settings)
                if any(wanted):
                    dlogits = chunked.dlogits(logits)
                    dentropy = -settings.entropy_coef * of_chunk.weights if settings.entropy_coef else None
                    backward(logits, found, table[some, DLOGPROB], dentropy, head, module, dlogits=dlogits)
                    chunked.accumulate(some)
                    del dlogits
                del logits, found
        ctx.save_for_backward(*_gradients(chunked, (hidden, weight, bias), wanted, group))
        loss, _, sums = with_sums(table, module)
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [made is not None for made in ctx.saved_tensors]
        return *operators.scaled(ctx.saved_tensors, grads[0], wanted), *[None] * 8


def _gradients(
    chunked: ChunkedHead, inputs: tuple[Tensor | None, ...], wanted: tuple[bool, ...], group: Any
) -> list[Tensor | None]:
    """Of hidden, summed over the ranks in the working dtype, and of this rank's weight and bias."""
    if chunked.dhidden is not None:
        chunked.dhidden = chunked.dhidden[: chunked.hidden.shape[0]].to(chunked.dtype)  # not what pads the rows
        dist.all_reduce(chunked.dhidden, group=group)
    return [made if need else None for made, need in zip(chunked.gradients(*inputs), wanted, strict=True)]
