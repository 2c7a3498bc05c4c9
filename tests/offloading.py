"""What several test files of offloading share: a model that moves, and the bytes that come and go."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import tiny
from fastppo import models
from fastppo.config_offload import OffloadConfig
from fastppo.offload.mover import Copies, Mover, tensors_of

CPU = torch.device("cpu")
ALL = OffloadConfig(reference="move", reward="move", critic="move", critic_optimizer="move", policy_optimizer="move")


def places(named: list[tuple[str, Tensor]]) -> set[int]:
    return {x.data_ptr() for _, x in named}


def moved(model: nn.Module) -> Mover:
    return Mover(lambda: tensors_of(model), CPU)


def deep(architecture: str, layers: int = 5) -> PreTrainedModel:
    shape: Any = tiny.CONFIGS[architecture]()
    setattr(shape, "n_layer" if architecture == "gpt2" else "num_hidden_layers", layers)
    if hasattr(shape, "layer_types"):
        shape.layer_types = [shape.layer_types[i % len(shape.layer_types)] for i in range(layers)]
    torch.manual_seed(0)
    return models.frozen(models.prepare_policy(models.new_causal_lm(shape)))


@contextmanager
def copied(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Bytes that come and go within it."""
    seen: Counter[str] = Counter()
    bring, take = Copies.bring, Copies.take

    def count(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Copies, pairs: list[tuple[Tensor, Tensor]]) -> Any:
            seen[name] += sum(target.numel() * target.element_size() for target, _ in pairs)
            return inner(self, pairs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Copies, "bring", count("in", bring))
        patch.setattr(Copies, "take", count("out", take))
        yield seen
