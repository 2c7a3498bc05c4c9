"""Whatever form weights and moments are kept in: small steps arrive, and a skip, a roll-back and a resume are exact."""

import gc
import importlib.util
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import runs
from batches import bfloat16, engine, equal_weights, trajectories
from fastppo import OptimizerConfig
from fastppo.adamw import make_adamw
from fastppo.masters import make_weight, stochastically_rounded
from fastppo.memory.ledger import Ledger
from fastppo.optimizer import Trainable, make_trainable
from fastppo.run import build

QUANTIZED = ["adamw-8bit", "adamw-4bit"]
FORMS = [(kind, masters) for kind in ["adamw", *QUANTIZED] for masters in ("float32", "stochastic")]
forms = pytest.mark.parametrize(("kind", "masters"), [*FORMS, ("adamw-cpu-offload", "float32")])
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="needs torchao: pip install 'fastppo[torchao]'"
)


SHAPES = {"large": (64, 128), "odd": (96, 80), "small": (50,)}


class Weights(nn.Module):
    """Two that are large enough to be quantized, the blocks of one across its rows, and one that is not."""

    def __init__(self, dtype: torch.dtype, value: float, names: Sequence[str]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name in names:
            noise = torch.randn(SHAPES[name], generator=generator) if value != 1 else torch.zeros(SHAPES[name])
            self.register_parameter(name, nn.Parameter((value + noise).to(dtype)))

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


@pytest.fixture(autouse=True)
def eager(request: pytest.FixtureRequest) -> Iterator[None]:
    """torchao compiles its step, for seconds per shape; what it compiles is what runs here."""
    if "compiled" in request.node.name:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def trainable(
    kind: str, masters: str, dtype: torch.dtype = torch.bfloat16, value: float = 0.0, names: Sequence[str] = (*SHAPES,),
    **options: Any,
) -> Any:  # fmt: skip
    """On this CPU, `adamw-cpu-offload` too: its masters are then copies beside the parameters."""
    if kind in QUANTIZED and importlib.util.find_spec("torchao") is None:
        pytest.skip("needs torchao: pip install 'fastppo[torchao]'")
    config = OptimizerConfig(**{"lr": 1e-3, "schedule": "constant", **options}, kind=kind, masters=masters)  # pyright: ignore
    model: Any = Weights(dtype, value, names)
    if kind != "adamw-cpu-offload":
        return make_trainable(model, config, 10)
    weights = {name: make_weight(p, config) for name, p in model.named_parameters()}
    return Trainable(model, weights, make_adamw([w.master for w in weights.values()], config), config, 10)


def backward(made: Trainable, seed: int, factor: float = 1.0) -> None:
    """A gradient from two micro-batches."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        for p in made.model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            (factor * (p.float() * noise).sum()).backward()


def run(made: Trainable, seeds: range) -> Trainable:
    for seed in seeds:
        backward(made, seed)
        made.step()
    return made


def everything(made: Trainable) -> dict[str, Tensor]:
    """Copies of what a checkpoint holds, and of what the model reads."""
    return made.snapshot() | {f"model/{n}": p.detach().clone() for n, p in made.model.named_parameters()}


@pytest.mark.parametrize(
    ("kind", "masters", "dtype"),
    [
        ("adamw", "float32", torch.float32),
        *((kind, "float32", torch.bfloat16) for kind in ("adamw", "adamw-cpu-offload")),
        pytest.param("adamw-4bit", "float32", torch.bfloat16, marks=pytest.mark.slow),
        *((kind, "stochastic", torch.bfloat16) for kind in ("adamw", "adamw-8bit")),
    ],
    ids=str,
)
def test_a_thousand_steps_of_a_millionth_arrive(kind: str, masters: str, dtype: torch.dtype) -> None:
    """CORRECTNESS D13: a weight of 1 moves by 1e-3; one that is rounded at random, on average over many."""
    options = {"lr": 1e-6, "eps": 1e-12, "max_grad_norm": None}
    made = trainable(kind, masters, dtype, value=1.0, names=("large",), **options)
    (weight,) = made.weights.values()
    for _ in range(1000):
        weight.gradient.grad = torch.ones(weight.parameter.shape)
        made.step()
    moved = 1 - weight.kept.detach().double()
    if masters == "float32":
        torch.testing.assert_close(moved, torch.full_like(moved, 1e-3), atol=2e-5, rtol=0)
        assert weight.kept.dtype == torch.float32 and torch.equal(weight.parameter, weight.master.to(dtype))
    else:  # a step down is 2^-8, taken a thousand times with a probability of 1e-6 / 2^-8
        deviation = (1000 * 1e-6 * 2**-8 / moved.numel()) ** 0.5
        assert weight.kept is weight.parameter and abs(float(moved.mean()) - 1e-3) < 4 * deviation + 2e-5


def test_rounding_at_random_is_right_on_average() -> None:
    """To one of the two neighbours, and the mean of many is the number: within 4.5 standard deviations of it."""
    x = torch.randn(500) * 10.0 ** torch.randint(-6, 4, (500,))
    draws = torch.stack([stochastically_rounded(x, seed) for seed in range(2000)]).double()
    toward = (x.view(torch.int32) & -65536).view(torch.float32).double()
    away = ((x.view(torch.int32) & -65536) + 65536).view(torch.float32).double()
    assert bool(((draws == toward) | (draws == away)).all())
    share = (x.double() - toward) / (away - toward)
    deviation = (away - toward).abs() * (share * (1 - share) / 2000).sqrt()
    assert bool(((draws.mean(0) - x.double()).abs() <= 4.5 * deviation + 1e-12).all())
    exact = x.bfloat16().float()
    assert torch.equal(stochastically_rounded(exact, 0).float(), exact)


def test_rounding_at_random_touches_no_global_generator_and_is_the_same_on_every_rank() -> None:
    state = torch.get_rng_state()
    one, other = (everything(run(trainable("adamw", "stochastic"), range(3))) for _ in range(2))
    assert equal_weights(one, other) and torch.equal(torch.get_rng_state(), state)


@forms
def test_a_resumed_optimizer_goes_on_bit_for_bit(kind: str, masters: str, tmp_path: Path) -> None:
    """Through a file without pickle, in which a quantized moment is its codes, scales and map."""
    undisturbed = run(trainable(kind, masters), range(5))
    stopped = run(trainable(kind, masters), range(3))
    save_file({k: v.contiguous() for k, v in stopped.state().items()}, tmp_path / "state.safetensors")
    state = load_file(tmp_path / "state.safetensors")
    resumed = trainable(kind, masters, value=3.0)
    resumed.load(sorted(state.items()))
    assert equal_weights(everything(resumed), everything(stopped))
    assert equal_weights(everything(run(resumed, range(3, 5))), everything(undisturbed))
    if kind in QUANTIZED:
        assert state["large/exp_avg.codes"].dtype == torch.uint8 and state["small/exp_avg"].dtype == torch.float32


@forms
@pytest.mark.parametrize("done", [0, 2])
def test_a_roll_back_is_bitwise(kind: str, masters: str, done: int) -> None:
    """To before the very first step, too; and what comes after it is what would have come."""
    made = run(trainable(kind, masters), range(done))
    before, kept = everything(made), made.snapshot()
    run(made, range(10, 12))
    assert not equal_weights(everything(made), before)
    made.restore(kept)
    assert equal_weights(everything(made), before)
    other = run(trainable(kind, masters), range(done))
    assert equal_weights(everything(run(made, range(3, 5))), everything(run(other, range(3, 5))))


@pytest.mark.parametrize("kind", ["adamw", *QUANTIZED])
@pytest.mark.parametrize("source", ["snapshot", "checkpoint", "checkpoint of a run that begins"])
def test_what_is_put_back_takes_the_place_of_what_was_there(source: str, kind: str) -> None:
    """One parameter of sixteen at a time: never two more than there are before or afterwards, by the memory handed
    out."""
    names = [f"p{i:02}" for i in range(16)]
    with patch.dict(SHAPES, dict.fromkeys(names, (64, 128))), Ledger() as ledger:
        made = run(trainable(kind, "float32", torch.float32, names=names), range(1))
        state = made.snapshot()
        one = sum(x.numel() * x.element_size() for x in state.values()) // len(names)
        if source == "checkpoint of a run that begins":
            made = trainable(kind, "float32", torch.float32, names=names)
        gc.collect()
        before, ledger.peak = ledger.live.total(), Counter()
        made.restore(state) if source == "snapshot" else made.load((name, x.clone()) for name, x in state.items())
        gc.collect()
        assert ledger.peak.total() - max(before, ledger.live.total()) <= 2 * one
    assert (not state) == (source == "snapshot")


@forms
def test_a_gradient_that_is_not_finite_leaves_every_bit(kind: str, masters: str) -> None:
    made = run(trainable(kind, masters), range(2))
    before = everything(made)
    backward(made, 7, factor=float("inf"))
    assert not made.step() < float("inf") and made.skipped == 1
    assert equal_weights(everything(made), before)
    assert all(w.gradient.grad is None and w.parameter.grad is None for w in made.weights.values())
    run(made, range(2, 3))
    assert equal_weights(everything(made), everything(run(trainable(kind, masters), range(3))))


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradients_of_micro_batches_are_added_in_float32(kind: str, masters: str, dtype: torch.dtype) -> None:
    made = trainable(kind, masters, dtype)
    backward(made, 0)
    generator = torch.Generator().manual_seed(0)
    parts = [{n: torch.randn(p.shape, generator=generator) for n, p in made.model.named_parameters()} for _ in "ab"]
    for name, weight in made.weights.items():
        one, other = (part[name].to(dtype).float() for part in parts)
        assert weight.gradient.grad.dtype == torch.float32 and torch.equal(weight.gradient.grad, one + other)


@forms
def test_gradients_are_clipped_before_the_step(kind: str, masters: str) -> None:
    """A step of a clipped gradient is that of the small gradient: with eps above it, Adam's step is g / eps."""
    ends = []
    for factor in (1.0, 100.0):
        made = trainable(kind, masters, value=0.1, eps=1e3, lr=1.0, max_grad_norm=1e-3)
        backward(made, 0, factor)
        made.step()
        ends.append({name: w.kept.detach().float() for name, w in made.weights.items()})
    for name in ends[0]:
        torch.testing.assert_close(*(end[name] for end in ends), atol=1e-5, rtol=0)


def test_masters_in_host_memory_are_stepped_as_on_the_device() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        here, host = (run(trainable(kind, "float32", dtype), range(4)) for kind in ("adamw", "adamw-cpu-offload"))
        assert equal_weights(everything(here), everything(host))
        assert all(w.waits and w.master.data_ptr() != w.parameter.data_ptr() for w in host.weights.values())


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_moments_step_near_exact_ones(kind: str) -> None:
    """One step is exact but for rounding: moments are quantized after it, to a quarter or less."""
    exact, coarse = (trainable(k, "float32", torch.float32) for k in ("adamw", kind))
    for made in (exact, coarse):
        run(made, range(1))
    for name, weight in exact.weights.items():
        torch.testing.assert_close(coarse.weights[name].kept, weight.kept, atol=1e-6, rtol=1e-6)
    moments = {n: x.numel() * x.itemsize for n, x in coarse.state().items() if n.startswith(("large/exp", "odd/exp"))}
    count = 2 * sum(coarse.weights[name].parameter.numel() for name in ("large", "odd"))
    assert sum(moments.values()) < count * {"adamw-8bit": 1.2, "adamw-4bit": 0.6}[kind]


@pytest.mark.slow
@needs_torchao
@pytest.mark.filterwarnings("ignore::UserWarning:torch.*")
@pytest.mark.parametrize("kind", QUANTIZED)
def test_the_compiled_step_is_the_eager_one(kind: str) -> None:
    compiled = run(trainable(kind, "float32"), range(3))
    with torch.compiler.set_stance("force_eager"):
        plain = run(trainable(kind, "float32"), range(3))
    for name, weight in compiled.weights.items():
        torch.testing.assert_close(weight.kept, plain.weights[name].kept, atol=2e-4, rtol=0)  # of steps of 1e-3


def test_offload_is_refused_where_there_is_no_device() -> None:
    with pytest.raises(ValueError, match="this model is on 'cpu' already: use 'adamw'"):
        engine(optimizer={"kind": "adamw-cpu-offload"})


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"policy_optimizer": {"masters": "stochastic"}}, "needs policy.dtype = 'bfloat16' and memory.share = 'none'"),
        ({"critic_optimizer": {"kind": "adamw-cpu-offload", "masters": "stochastic"}}, "masters must be 'float32'"),
        ({"policy_optimizer": {"kind": "adam-8bit"}}, "did you mean 'adamw-8bit'?"),
    ],
)
def test_forms_that_do_not_go_together_are_refused(changes: Any, fragment: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(fragment)):
        runs.config(tmp_path, **changes)


def test_without_torchao_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a model is loaded."""
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else there(name))
    with pytest.raises(ValueError, match=r"'adamw-8bit' needs the package torchao: pip install 'fastppo\[torchao\]'$"):
        build(runs.config(tmp_path, policy={"path": "/nowhere"}, critic_optimizer={"kind": "adamw-8bit"}))


def test_a_policy_rounded_at_random_trains() -> None:
    """No float32 copy of a bfloat16 weight is left behind, and the ratio is 1 before the first step of an update."""
    made = engine(bfloat16(engine().policy), optimizer={"masters": "stochastic"}, ppo={"num_epochs": 2})
    for seed in range(2):
        logged = made.update(made.score(trajectories(seed=seed), [float(i) for i in range(8)]))
        assert logged["val/ratio_max_first"] == 1.0 and logged["policy/skipped_steps"] == 0
    kept = [w for w in made._policy.weights.values() if w.parameter.dtype == torch.bfloat16]
    assert len(kept) == len(made._policy.weights) and all(w.master.untyped_storage().nbytes() == 0 for w in kept)
