"""Tensors that wait in host memory: a mover of all of them, and one that brings a model layer by layer.

On a CPU host memory is another place in the same memory, so both copies can be counted; and what comes is copied at the
last moment at which a GPU may do it, so that whoever reads too early reads NaN.
"""

import gc
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedModel

import tiny
from batches import equal_weights, trajectories, weights
from fastppo import RewardModel, models
from fastppo.memory.ledger import Ledger
from fastppo.microbatch import gather
from fastppo.offload.layers import Streamer, size_of, split, streamed_bytes
from fastppo.offload.mover import Mover, coming, tensors_of
from fastppo.offload.roles import of_frozen
from fastppo.rewards import to_samples
from offloading import CPU, copied, deep, moved, places

# --- one mover ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_parameters_stay_the_objects_they_are_and_wait_in_one_place(architecture: str) -> None:
    """Tied weights too, which have one place."""
    model = tiny.policy(architecture)
    named, before = tensors_of(model), weights(model)
    first = [weakref.ref(x.untyped_storage()) for _, x in named]
    mover = moved(model)
    waiting = places(named)
    assert all(storage() is None for storage in first), "what was on the device is still there"
    for _ in range(2):
        mover.arrive()
        here = [weakref.ref(x.untyped_storage()) for _, x in named]
        assert not places(named) & waiting and equal_weights(weights(model), before)
        mover.leave()
        assert all(storage() is None for storage in here)
        assert places(named) == waiting == {x.data_ptr() for x in mover.host.values()}
    assert [id(x) for _, x in tensors_of(model)] == [id(x) for _, x in named]
    assert equal_weights(weights(model), before)


def test_nothing_can_be_read_before_it_has_arrived() -> None:
    model = tiny.policy()
    mover = moved(model)
    mover.begin()
    assert all(bool(p.isnan().all()) for p in model.parameters())
    mover.arrive()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_only_what_changed_is_carried_back() -> None:
    layer = nn.Linear(4, 4)
    mover, before = moved(layer), weights(layer)
    for changed in (False, True):
        with torch.no_grad():
            mover.arrive()
            layer.weight.add_(1.0)
        mover.leave(changed=changed)
        assert torch.equal(layer.weight, before["weight"] + float(changed))


def test_tensors_that_were_replaced_leave_no_place_behind() -> None:
    """As a roll-back replaces the moments of an optimizer; and those that are gone have none."""
    state = {"a": torch.ones(1000), "b": torch.ones(500)}
    mover = Mover(lambda: list(state.items()), CPU)
    place = weakref.ref(mover.host["b"].untyped_storage())
    mover.arrive()
    state["a"] = torch.full((1000,), 2.0)
    state["c"] = torch.full((7,), 3.0)
    del state["b"]
    mover.leave(changed=True)
    assert {name: float(x[0]) for name, x in state.items()} == {"a": 2.0, "c": 3.0}
    assert place() is None and set(mover.host) == {"a", "c"}


def test_a_failure_while_coming_leaves_everything_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.policy()
    mover, named = moved(model), tensors_of(model)
    waiting, made, inner = places(named), [0], torch.empty_like

    def fails(*args: Any, **kwargs: Any) -> Tensor:
        made[0] += 1
        if made[0] == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", fails)
        with pytest.raises(torch.OutOfMemoryError), coming(mover):
            raise AssertionError("not reached")
    assert places(named) == waiting and not mover.is_here
    mover.arrive()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


# --- layer by layer --------------------------------------------------------------------------------------------------


def bert() -> PreTrainedModel:
    shape = BertConfig(vocab_size=48, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
    shape.num_labels = 1
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(shape).eval()


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_two_layers_at_most_are_there_and_each_comes_once(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep(architecture)
    batch = gather(trajectories(), range(4))
    with torch.no_grad():
        expected = models.hidden_states(model, batch)
    layers, rest = split(model)
    most, streamer = [0], Streamer(model, CPU)

    def count(*_: Any) -> None:
        most.append(sum(mover.is_here for mover in streamer.layers))

    for layer, _ in layers:
        layer.register_forward_pre_hook(count)
    with copied(monkeypatch) as seen, torch.no_grad(), coming(streamer):
        streamer.arrive()
        assert streamer.rest.is_here and not any(mover.is_here for mover in streamer.layers[1:])
        found = [models.hidden_states(model, batch) for _ in range(2)]
    assert all(torch.equal(x, expected) for x in found)
    assert max(most) == 2 and len(layers) == 5
    each = [size_of(tensors) for _, tensors in layers]
    came = size_of(rest) + 2 * sum(each) + each[0]  # the first layer for a third forward
    assert seen == {"in": came, "out": 0}
    assert not streamer.rest.is_here and not any(mover.is_here for mover in streamer.layers)
    assert streamed_bytes(model) == size_of(rest) + 2 * max(each) < size_of(tensors_of(model))


def test_a_streamed_forward_holds_two_layers_and_not_the_model() -> None:
    """By the memory that was handed out, beside the places in host memory."""
    gc.collect()
    with Ledger() as ledger:
        model = deep("llama", 12)
        streamer, batch = Streamer(model, CPU), gather(trajectories(), range(4))
        gc.collect()
        waiting, ledger.peak = ledger.live.total(), Counter()
        with torch.no_grad(), coming(streamer):
            streamer.arrive()
            there = ledger.live.total() - waiting
            models.hidden_states(model, batch)
        peak = ledger.peak.total() - waiting
        gc.collect()
        assert ledger.live.total() - waiting < 1000, "something stays on the device"
    layers, rest = split(model)
    one, whole = size_of(layers[0][1]), size_of(tensors_of(model))
    assert there == size_of(rest) + one and there + one <= peak < there + 3 * one < whole


def test_a_forward_that_failed_leaves_no_layer_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = deep("qwen2"), gather(trajectories(), range(4))
    with torch.no_grad():
        expected = models.hidden_states(model, batch)
    (layer, _), failing = split(model)[0][2], [True]
    streamer = Streamer(model, CPU)

    def fail(*_: Any) -> None:
        if failing:
            failing.pop()
            raise torch.OutOfMemoryError("CUDA out of memory")

    layer.register_forward_pre_hook(fail)
    with torch.no_grad(), coming(streamer):
        streamer.arrive()
        with pytest.raises(torch.OutOfMemoryError):
            models.hidden_states(model, batch)
        assert torch.equal(models.hidden_states(model, batch), expected)
        assert sum(mover.is_here for mover in streamer.layers) == 2
    assert not any(mover.is_here for mover in streamer.layers)


@pytest.mark.parametrize("way", ["move", "stream"])
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_reward_model_says_the_same_and_is_there_for_its_calls(kind: str, way: Any) -> None:
    model = bert() if kind == "encoder" else models.frozen(models.reward_model_from(tiny.policy()))
    reward, samples = RewardModel(model, batch_size=3), to_samples(trajectories(), None)
    expected = reward(samples)
    reward.weights_at = of_frozen(model, way, CPU)
    waiting = places(tensors_of(model))
    for _ in range(2):
        assert reward(samples) == expected and places(tensors_of(model)) == waiting


def test_a_model_without_a_list_of_layers_cannot_be_streamed() -> None:
    with pytest.raises(
        ValueError, match=r"Linear has no list of layers to stream: set its key of \[offload\] to 'move"
    ):
        of_frozen(nn.Linear(2, 2), "stream", CPU)
