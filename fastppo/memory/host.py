"""What a run holds in host memory beside a GPU: what moves, optimizers that stay there, copies of both."""

import functools
from typing import TYPE_CHECKING

from fastppo.memory import passes
from fastppo.memory.ledger import dry_run
from fastppo.memory.passes import Model
from fastppo.memory.presence import holdings
from fastppo.memory.sizes import moment_tensors
from fastppo.offload.mover import tensors_of

if TYPE_CHECKING:
    from fastppo.memory.plan import Setting


def in_host_memory(setting: "Setting") -> int:
    """Bytes of what moves, which has a place there wherever it is, and of optimizers that stay there, with the copy of
    one to roll back to."""
    held = list(holdings(setting))
    if setting.device.type == "cpu":  # where nothing is pinned
        return sum(x.whole.total() for x in held if x.way != "keep")
    weights = sum(_pinned_weights(x.model) for x in held if x.way != "keep" and not x.optimizer)
    steps = sum(_pinned_optimizer(x.model) for x in held if x.optimizer and (x.way != "keep" or _steps_there(x.model)))
    return weights + steps + roll_back_copy(setting)[1]


def checkpoint_copy(setting: "Setting") -> int:
    """Bytes from which a checkpoint is written beside training: weights, masters and moments of all that learns."""
    return sum(_learned(x.model) for x in holdings(setting) if x.optimizer) if setting.copies_to_save else 0


def roll_back_copy(setting: "Setting") -> tuple[int, int]:
    """Bytes on the device and in host memory: a master, or the weight that is all there is, and its moments."""
    if not setting.roll_back:
        return 0, 0
    size, on_host = passes.sizes(setting.policy), _steps_there(setting.policy)
    copy = 3 * size.gradients if on_host else (size.masters or size.trained) + size.moments
    return (0, copy) if on_host else (copy, 0)


def _steps_there(model: Model) -> bool:
    return model.optimizer.kind == "adamw-cpu-offload"


def _learned(model: Model) -> int:
    size = passes.sizes(model)
    elsewhere = 3 * size.gradients if _steps_there(model) else 0  # float32: master and moments
    return size.trained + size.masters + size.moments + elsewhere


@functools.cache
def _pinned_weights(model: Model) -> int:
    with dry_run() as ledger:
        return sum(pinned(x.numel() * x.element_size()) for _, x in tensors_of(model.outline(ledger)))


@functools.cache
def _pinned_optimizer(model: Model) -> int:
    """Of an optimizer that stays there masters alone are pinned."""
    kind, rounds = model.optimizer.kind, model.optimizer.masters == "stochastic"
    with dry_run() as ledger:
        sizes = [(p.numel(), p.element_size() == 4) for p in model.outline(ledger).parameters() if p.requires_grad]
    if _steps_there(model):
        return sum(pinned(4 * n) + 8 * n for n, _ in sizes)
    masters = sum(pinned(4 * n) for n, exact in sizes if not (exact or rounds))
    return masters + sum(pinned(size) for n, _ in sizes for size in moment_tensors(n, kind))


def pinned(size: int) -> int:
    """Bytes that PyTorch takes for a pinned tensor: the next power of two."""
    return 1 << (size - 1).bit_length() if size else 0
