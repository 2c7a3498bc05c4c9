"""A model of which one layer at a time is on the device, and the next one on its way."""

from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastppo.checks import require
from fastppo.offload.mover import Copies, Mover, tensors_of

LAYERS_AT_A_TIME = 2


class Streamer:
    """A `Presence` of a model that does not train. Its layers come and go by themselves as its forward passes them.

    Each forward brings every layer once: the copy of a layer runs while the one before it computes. After the last
    layer comes the first one, for the forward of the next micro-batch.

    Raises:
        ValueError: there is no list of at least two layers in the model.
    """

    def __init__(self, model: nn.Module, home: torch.device) -> None:
        layers, rest = split(model)
        copies = Copies(home)
        self.rest = Mover(lambda: rest, home, copies)
        self.layers = [Mover(partial(list, tensors), home, copies) for _, tensors in layers]
        for i, (layer, _) in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._enter, i))

    def begin(self) -> None:
        self.rest.begin()
        self.layers[0].begin()

    def arrive(self) -> None:
        self.begin()
        self.rest.arrive()

    def leave(self, *, changed: bool = False) -> None:
        assert not changed, "a model that is streamed does not train"
        for mover in (self.rest, *self.layers):
            mover.leave()

    def _enter(self, i: int, *_: Any) -> None:
        following = (i + 1) % len(self.layers)
        for j, layer in enumerate(self.layers):
            if j not in (i, following):
                layer.leave()  # the one before, and what a forward that failed has left
        self.layers[i].arrive()
        self.layers[following].begin()


def split(model: nn.Module) -> tuple[list[tuple[nn.Module, list[tuple[str, Tensor]]]], list[tuple[str, Tensor]]]:
    """The layers of the largest list of them, each with the tensors that are its own; and all other tensors."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    require(
        len(lists) > 0, f"{type(model).__name__} has no list of layers to stream: set its key of [offload] to 'move'"
    )
    found = max(lists, key=lambda layers: sum(size_of(tensors_of(layer)) for layer in layers))
    owners = Counter(id(x) for layer in found for _, x in tensors_of(layer))
    owners.update(id(x) for module in _outside(model, found) for _, x in _direct(module))
    layers = [(layer, [(name, x) for name, x in tensors_of(layer) if owners[id(x)] == 1]) for layer in found]
    own = {id(x) for _, tensors in layers for _, x in tensors}
    return layers, [(name, x) for name, x in tensors_of(model) if id(x) not in own]


def streamed_bytes(model: nn.Module) -> int:
    """Of its tensors on the device while it computes, at most."""
    layers, rest = split(model)
    sizes = sorted(size_of(tensors) for _, tensors in layers)
    return size_of(rest) + sum(sizes[-LAYERS_AT_A_TIME:])


def size_of(tensors: list[tuple[str, Tensor]]) -> int:
    """Bytes."""
    return sum(x.numel() * x.element_size() for _, x in tensors)


def _outside(model: nn.Module, layers: nn.ModuleList) -> list[nn.Module]:
    inside = {id(module) for module in layers.modules()}
    return [module for module in model.modules() if id(module) not in inside]


def _direct(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
