"""A dry run of few layers says of a deep model what a dry run of all its layers does, byte for byte."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tiny
from fastppo import LayersConfig, MemoryConfig
from fastppo.memory import depth, passes
from fastppo.memory.passes import Load, Model
from fastppo.models.outline import Kind

DEPTH = 11
WAYS: dict[str, tuple[str, Kind, dict[str, Any]]] = {
    "policy": ("qwen2", "policy", {}),
    "critic": ("llama", "critic", {}),
    "windows in every other layer": ("gemma2", "policy", {}),
    "no rotary positions": ("gpt2", "policy", {}),
    "on a CPU": ("qwen2", "policy", {"device": torch.device("cpu")}),
    "computed again": ("qwen2", "policy", {"layers": LayersConfig(checkpointing="full", checkpoint_every=2)}),
    "products kept": ("llama", "critic", {"layers": LayersConfig(checkpointing="selective")}),
    "adapters": ("llama", "policy", {"memory": MemoryConfig(share="lora")}),
}


def model(architecture: str, kind: Kind, others: dict[str, Any]) -> Model:
    config = tiny.CONFIGS[architecture]()
    config.layer_types = None
    config.num_hidden_layers = DEPTH
    made = type(config).from_dict({k: v for k, v in config.to_dict().items() if v is not None or k != "layer_types"})
    made.num_labels = 1
    return Model(**{"config": made, "kind": kind, "dtype": "bfloat16", "device": torch.device("cuda"), **others})


def peaks(made: Model) -> list[Any]:
    """None of it remembered."""
    load, found = Load(3, 9, 7), []
    found.append(passes._gradient.__wrapped__(made, load, False))  # whose gradients grow as activations go
    found.append(passes.forward.__wrapped__(made, load))  # pyright: ignore[reportFunctionMemberAccess]
    if made.kind == "policy":
        sampling: Callable[..., Any] = passes.sampling.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]
        found.append(sampling(made, 5, 9, 7, span=4, prefill=18))
    return found


@pytest.mark.parametrize("way", WAYS)
def test_few_layers_stand_for_many(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, run, layers = model(*WAYS[way]), depth.extrapolated, []

    def whole(dry: Any, depth: int, period: int) -> Any:
        return dry(None)

    def watched(dry: Any, depth: int, period: int) -> Any:
        return run(lambda n: (layers.append(n), dry(n))[1], depth, period)

    monkeypatch.setattr(depth, "extrapolated", whole)
    expected = peaks(made)
    monkeypatch.setattr(depth, "extrapolated", watched)
    assert peaks(made) == expected
    assert layers and None not in layers


def test_layers_that_differ_are_all_run() -> None:
    """Whatever a config says of them, or does not."""
    raw = tiny.raw_lm()
    assert depth.period_of(raw) == 1
    body: Any = raw.base_model
    body.layers[1].mlp.up_proj.weight.requires_grad_(False)
    assert depth.period_of(raw) == 0
    assert depth.extrapolated(lambda n: [[]] if n is None else pytest.fail(f"{n} layers"), 30, 0) == [[]]
