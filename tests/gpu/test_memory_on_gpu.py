"""Adapters on one base and the optimizers' forms, on a GPU."""

import importlib.util
from typing import Any

import pytest
import torch

import tiny
from batches import (
    SCORES,
    bfloat16,
    engine,
    equal_weights,
    largest_gap,
    prompts,
    recorded_gradients,
    trajectories,
    weights,
    with_random_head,
)
from fastppo import LayersConfig, OptimizerConfig, models
from fastppo.config import MemoryConfig
from fastppo.masters import gradients_where_masters_are, make_weight
from fastppo.optimizer import Trainable, make_trainable
from fastppo.score import action_logprobs

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
KINDS = ["adamw", "adamw-8bit", "adamw-4bit", "adamw-cpu-offload"]


def module(dtype: torch.dtype) -> Any:
    """Two parameters, one of which is large enough to be quantized."""
    torch.manual_seed(0)
    made: Any = torch.nn.Linear(128, 96, device=DEVICE, dtype=dtype)
    made.device, made.dtype = DEVICE, dtype
    return made


def run(made: Trainable, seeds: range) -> Trainable:
    for seed in seeds:
        x = torch.randn(8, 128, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        made.model(x.to(made.model.dtype)).float().square().sum().backward()
        made.step()
    return made


def trainable(kind: Any, masters: Any = "float32", dtype: torch.dtype = torch.bfloat16) -> Trainable:
    if kind in ("adamw-8bit", "adamw-4bit"):
        pytest.importorskip("torchao")
    return make_trainable(module(dtype), OptimizerConfig(kind=kind, masters=masters, lr=1e-3, schedule="constant"), 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_offloaded_steps_are_those_of_the_device(dtype: torch.dtype) -> None:
    here, host = (run(trainable(kind, "float32", dtype), range(5)) for kind in ("adamw", "adamw-cpu-offload"))
    for name, weight in here.weights.items():
        moved = host.weights[name]
        assert moved.master.device.type == "cpu" and moved.master.is_pinned()
        assert all(s.device.type == "cpu" for s in host.optimizer.state[moved.master].values())
        torch.testing.assert_close(moved.master, weight.master.cpu(), atol=1e-5, rtol=0)
        assert torch.equal(moved.parameter.cpu(), moved.master.to(dtype))


@pytest.mark.filterwarnings("ignore::UserWarning:torch.*")
@pytest.mark.parametrize(("kind", "masters"), [*((k, "float32") for k in KINDS), ("adamw", "stochastic")])
def test_a_resumed_optimizer_goes_on_bit_for_bit(kind: str, masters: str) -> None:
    undisturbed, stopped = run(trainable(kind, masters), range(5)), run(trainable(kind, masters), range(3))
    resumed = trainable(kind, masters)
    resumed.load((name, x.cpu()) for name, x in stopped.state().items())
    assert equal_weights(run(resumed, range(3, 5)).snapshot(), undisturbed.snapshot())


def test_rounding_at_random_leaves_no_float32_copy() -> None:
    made = run(trainable("adamw", "stochastic"), range(2))
    assert all(w.master.untyped_storage().nbytes() == 0 for w in made.weights.values())
    assert all(w.gradient.untyped_storage().nbytes() == 4 for w in made.weights.values())


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft: pip install 'fastppo[lora]'")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_on_one_base_train_and_the_reference_stays(dtype: torch.dtype, checkpointing: bool) -> None:
    base = tiny.policy(scale=1.0, layers=tiny.LAYERS[checkpointing])
    base = models.to_device(base if dtype == torch.float32 else bfloat16(base), DEVICE)
    policy = models.adapt(base, MemoryConfig(lora_rank=4))
    made = engine(policy, ppo={"num_epochs": 2})
    given = trajectories(device=DEVICE)
    before = action_logprobs(made.reference, given, temperature=1.0, max_tokens=100)  # pyright: ignore
    start = weights(policy)
    for _ in range(2):
        logged = made.update(made.score(made.generate(prompts()), SCORES))
        assert logged["val/ratio_max_first"] == 1.0 and logged["policy/skipped_steps"] == 0
    after = action_logprobs(made.reference, given, temperature=1.0, max_tokens=100)  # pyright: ignore
    assert torch.equal(before, after) and largest_gap(weights(policy), start) > 0


def kept_by_an_update(layers: LayersConfig) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of policy and critic, and the most that was allocated beside what was there before."""
    policy = models.to_device(tiny.policy(scale=1.0, layers=layers), DEVICE)
    made = engine(policy, critic=models.critic_from(policy, layers=layers))
    found = recorded_gradients(with_random_head(made))
    experience = made.score(trajectories([(28, 100)] * 8, device=DEVICE), SCORES)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    made.update(experience)
    return found, torch.cuda.max_memory_allocated() - before


def test_layers_that_keep_less_give_the_same_gradients_in_less_memory() -> None:
    ladder = [
        LayersConfig(),
        LayersConfig(checkpointing="selective"),
        LayersConfig(checkpointing="full"),
        LayersConfig(checkpointing="full", offload_activations=True),
    ]
    gradients, peaks = zip(*(kept_by_an_update(layers) for layers in ladder), strict=True)
    assert all(equal_weights(found, gradients[0]) for found in gradients[1:])
    assert peaks[0] > peaks[1] > peaks[2] > peaks[3]


@pytest.mark.parametrize("fused", ["liger", "compile"])
def test_fused_layers_are_of_one_model_and_the_ratio_stays_1(fused: Any) -> None:
    if fused == "liger":
        pytest.importorskip("liger_kernel")
    plain, changed = (models.to_device(tiny.policy(scale=1.0), DEVICE) for _ in range(2))
    models.fuse_layers(changed, LayersConfig(fused=fused))
    given = trajectories(device=DEVICE)
    expected, found = (action_logprobs(m, given, temperature=1.0, max_tokens=100) for m in (plain, changed))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    made = engine(changed)
    logged = made.update(made.score(made.generate(prompts()), SCORES))
    assert logged["val/ratio_max_first"] == 1.0 and logged["policy/skipped_steps"] == 0
    assert torch.equal(action_logprobs(plain, given, temperature=1.0, max_tokens=100), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_masters_of_a_model_on_another_gpu_than_the_current_one_get_whole_gradients() -> None:
    """The copy begins behind work that the other GPU's stream still has before it."""
    there = torch.device("cuda", 1)
    config = OptimizerConfig(kind="adamw-cpu-offload")
    weights = [make_weight(torch.nn.Parameter(torch.zeros(4096, 4096, device=there)), config) for _ in range(4)]
    busy = torch.randn(8192, 8192, device=there)
    with torch.cuda.device(0):
        for _ in range(20):
            busy = busy @ busy.sin()
        for i, weight in enumerate(weights):
            weight.gradient.grad = torch.full_like(weight.parameter, float(i + 1))
        for i, (_, gradient) in enumerate(gradients_where_masters_are(weights)):
            assert bool((gradient == i + 1).all())
