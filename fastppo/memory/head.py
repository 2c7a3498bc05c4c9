"""What the fused heads hold: stand-ins for their operators that make the same outputs and say what they take inside.

An operator of torch.library is one step to whoever watches from outside, so its buffers are stated here.
"""

from typing import Any

import torch
from torch import Tensor

from fastppo.memory.ledger import Ledger
from fastppo_kernels.head import peak_bytes

PPO_TABLE, VALUE_TABLE = 16, 8  # float32 columns of the per-row tables that the losses make


class HeadLoss(torch.autograd.Function):
    """`linear_ppo_loss` or `linear_value_loss`: the gradients of their inputs are made along with the loss."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ledger: Ledger, inside: int) -> Tensor:
        ledger.note("LM head", inside)
        with ledger.labelled("LM head"):
            needs = zip((hidden, weight), ctx.needs_input_grad[:2], strict=True)
            ctx.save_for_backward(*(torch.empty_like(x) if need else x.new_empty(0) for x, need in needs))
            return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *(x if x.numel() else None for x in ctx.saved_tensors), None, None


def policy_loss(hidden: Tensor, weight: Tensor, ledger: Ledger, device: torch.device) -> Tensor:
    """As `linear_ppo_loss` on `device`, in memory."""
    return HeadLoss.apply(hidden, weight, ledger, head_bytes(hidden, weight, device, train=True))  # pyright: ignore


def value_loss(hidden: Tensor, weight: Tensor, ledger: Ledger) -> Tensor:
    """As `linear_value_loss`, in memory."""
    inside = hidden.numel() * hidden.element_size() + 4 * VALUE_TABLE * hidden.shape[0]
    return HeadLoss.apply(hidden, weight, ledger, inside)  # pyright: ignore[reportReturnType]


def head_bytes(hidden: Tensor, weight: Tensor, device: torch.device, *, train: bool) -> int:
    """Most bytes that the LM head takes at a time for these operands, outputs included."""
    wanted = (train and hidden.requires_grad, train and weight.requires_grad)
    rows, (vocab_size, hidden_size) = hidden.shape[0], weight.shape
    table = 4 * rows * (PPO_TABLE if train else 1)
    return table + peak_bytes(rows, vocab_size, hidden_size, hidden.dtype, weight.dtype, device, wanted=wanted)
