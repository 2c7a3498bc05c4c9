"""The presences that a run file asks for, role by role."""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastppo.adamw import plain_tensors
from fastppo.checks import require
from fastppo.config_offload import FrozenWay, OffloadConfig
from fastppo.offload.layers import Streamer
from fastppo.offload.mover import Kept, Mover, Presence, tensors_of

if TYPE_CHECKING:
    from fastppo.optimizer import Trainable


def require_gpu(config: OffloadConfig, device: torch.device) -> None:
    """
    Raises:
        ValueError: something is to leave a device whose memory is host memory.
    """
    key, way = next(iter(config.chosen.items()), ("", "keep"))
    require(
        way == "keep" or device.type == "cuda",
        f"offload.{key} = {way!r} sends what a GPU need not hold to host memory, and this run is on {device.type!r}, "
        "whose memory that is: set it to 'keep'",
    )


def of_frozen(
    model: nn.Module | None, way: FrozenWay, home: torch.device, *, beside: nn.Module | None = None
) -> Presence:
    """Of a model that does not train, which is in host memory afterwards unless `way` is "keep".

    Args:
        beside: a model that stays, whose tensors it must not have.
    """
    require(way == "keep" or model is not None, f"there is no model to {way}: its key of [offload] must be 'keep'")
    if model is None or way == "keep":
        return Kept()
    _require_own(model, beside)
    return Streamer(model, home) if way == "stream" else Mover(partial(tensors_of, model), home)


def attach(role: "Trainable | None", config: OffloadConfig, name: str, *, beside: nn.Module | None = None) -> None:
    """Send away what `config` says of the role called `name`. `beside`: as for `of_frozen`."""
    weights, optimizer = getattr(config, name, "keep"), getattr(config, f"{name}_optimizer")
    require(
        role is not None or weights == optimizer == "keep",
        f"there is no {name}: offload.{name} and offload.{name}_optimizer must be 'keep'",
    )
    if role is None:
        return
    home = role.model.device
    if weights == "move":
        _require_own(role.model, beside)
        role.weights_at = Mover(partial(tensors_of, role.model), home)
    if optimizer == "move":
        on_host = role.config.kind == "adamw-cpu-offload"
        require(
            not on_host, f"offload.{name}_optimizer: 'adamw-cpu-offload' is in host memory already: set it to 'keep'"
        )
        role.optimizer_at = Mover(partial(optimizer_tensors, role), home)


def _require_own(model: nn.Module, beside: nn.Module | None) -> None:
    theirs = {x.data_ptr() for _, x in tensors_of(beside) if x.numel()} if beside is not None else set()
    require(
        not any(x.data_ptr() in theirs for _, x in tensors_of(model) if x.numel()),
        f"a {type(model).__name__} on the base of the policy has no weights of its own to offload: set its key of "
        "[offload] to 'keep'",
    )


def optimizer_tensors(role: "Trainable") -> Iterator[tuple[str, Tensor]]:
    """Masters that are no parameters, and moments, by parameter name: `<name>` and `<name>/<moment>`."""
    for name, weight in role.weights.items():
        if weight.master is not weight.parameter:
            yield name, weight.master
        yield from ((f"{name}/{key}", x) for key, x in plain_tensors(role.optimizer.state.get(weight.master, {})))
