"""A gradient that was made along with the loss, times grad_output.

It is final when grad_output is 1, which only the device knows: `fastppo::scale_` asks there, and then leaves it alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastppo_kernels import backend as backends


@torch.library.custom_op("fastppo::scale_", mutates_args=("x",))
def scale_(x: Tensor, factor: Tensor) -> None:
    """x *= factor, () in x's working dtype, rounded once; where factor is 1 not a byte of x is touched."""
    backends.load("triton" if x.is_cuda else "reference").scale_(x, factor)


@scale_.register_fake
def _(x, factor):
    return None


def keep_gradients(ctx: Any, *gradients: Tensor) -> None:
    """Saves the gradients for `scaled`, in the setup of a backward."""
    ctx.save_for_backward(*gradients)
    ctx.set_materialize_grads(False)  # the gradients are outputs of their operator: no zeros as large as they are


def scaled(gradients: Sequence[Tensor], factor: Tensor | None, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradients that are `wanted` times `factor` (None: 0), None for the others; to be called in a backward.

    They are scaled where they lie if autograd frees the graph after this backward, as nobody reads them again. If it
    keeps the graph (retain_graph=True) they stay what they are for the next backward, and copies are scaled; so are
    they where torch.compile traces this, whose graphs overwrite nothing.

    Raises:
        RuntimeError: see `differentiated_once`.
    """
    if factor is None:
        return (None,) * len(wanted)
    differentiated_once(factor)
    return tuple(_scaled(x, factor) if need else None for x, need in zip(gradients, wanted, strict=True))


def differentiated_once(factor: Tensor) -> None:
    """To be called in a backward whose result has no gradient of its own.

    Raises:
        RuntimeError: with create_graph=True; the gradient of this gradient would silently be 0.
    """
    if torch.is_grad_enabled() and type(factor) is Tensor and not torch.compiler.is_compiling():
        raise RuntimeError(
            "this gradient was made along with the loss and cannot be differentiated again: leave out create_graph=True"
        )


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    kept = torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue]
    if kept or type(x) is not Tensor:
        x = x.detach().clone()
    scale_(x, factor)
    return x
