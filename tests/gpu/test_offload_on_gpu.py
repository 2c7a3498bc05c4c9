"""Offloading on a GPU: bytes that leave and come back, on a stream of their own, from pinned memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import runs
import tiny
from batches import LENGTHS, SCORES, bfloat16, engine, equal_weights, prompts, trajectories, weights
from fastppo import PPOEngine, RewardModel, models, train
from fastppo.config_offload import OffloadConfig
from fastppo.microbatch import gather
from fastppo.models import LMHead
from fastppo.offload.layers import Streamer, size_of, split
from fastppo.offload.mover import Mover, coming, tensors_of
from fastppo.offload.roles import of_frozen
from fastppo.rewards import to_samples
from offloading import ALL, deep

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
BLOCK = 512  # bytes that the allocator rounds to


def allocated() -> int:
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def on_device(architecture: str = "llama", layers: int = 8) -> Any:
    return models.to_device(deep(architecture, layers), DEVICE)


def made_with(offload: OffloadConfig, dtype: str = "float32", **optimizer: Any) -> PPOEngine:
    policy = tiny.policy(scale=1.0) if dtype == "float32" else bfloat16(tiny.policy(scale=1.0))
    policy = models.to_device(policy, DEVICE)
    return engine(policy, ppo={"num_epochs": 2, "num_minibatches": 2}, optimizer=optimizer, offload=offload)


def test_bytes_leave_and_come_back_from_pinned_memory() -> None:
    before = allocated()
    model = on_device()
    values, there = weights(model), allocated() - before
    copies = allocated() - before - there  # of `weights`
    mover = Mover(lambda: tensors_of(model), DEVICE)
    assert allocated() - before == copies and all(x.is_pinned() for x in mover.host.values())
    assert all(p.device.type == "cpu" for p in model.parameters())
    for _ in range(3):
        mover.arrive()
        assert allocated() - before == there + copies and equal_weights(weights(model), values)
        mover.leave()
        assert allocated() - before == copies


def test_what_has_changed_is_in_host_memory_when_it_has_left() -> None:
    """Written by kernels that may still run when it is told to leave."""
    layer = torch.nn.Linear(4096, 4096, device=DEVICE)
    mover = Mover(lambda: tensors_of(layer), DEVICE)
    for i in range(1, 4):
        mover.arrive()
        with torch.no_grad():
            for _ in range(50):
                layer.weight.mul_(1.001)
            layer.weight.fill_(float(i))
        mover.leave(changed=True)
        assert bool((layer.weight == i).all())


def test_copies_run_on_a_stream_of_their_own() -> None:
    model, batch = on_device(), gather(trajectories(device=DEVICE), range(len(LENGTHS)))
    streamer = Streamer(model, DEVICE)

    def run() -> None:
        with torch.no_grad(), coming(streamer):
            streamer.arrive()
            models.hidden_states(model, batch)
        torch.cuda.synchronize()

    run()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run()
    events = [e for e in profiled.profiler.kineto_results.events() if "CUDA" in str(e.device_type())]  # pyright: ignore
    copies = {e.device_resource_id() for e in events if e.name().startswith("Memcpy HtoD (Pinned")}
    kernels = {e.device_resource_id() for e in events if not e.name().startswith("Mem")}
    assert copies and kernels and not copies & kernels


@pytest.mark.parametrize("way", ["move", "stream"])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_frozen_model_says_the_same(architecture: str, way: Any) -> None:
    model, batch = on_device(architecture), gather(trajectories(device=DEVICE), range(len(LENGTHS)))
    with torch.no_grad():
        expected = models.hidden_states(model, batch)
        presence = of_frozen(model, way, DEVICE)
        for _ in range(5):
            with coming(presence):
                presence.arrive()
                head: LMHead = models.lm_head(model)
                assert torch.equal(models.hidden_states(model, batch), expected) and head.weight.is_cuda


def test_a_streamed_model_holds_two_layers_at_most() -> None:
    model, batch = on_device(layers=24), gather(trajectories(device=DEVICE), range(len(LENGTHS)))
    layers, rest = split(model)
    streamer = Streamer(model, DEVICE)
    with torch.no_grad():
        models.to_device(torch.nn.Linear(1, 1), DEVICE)  # pyright: ignore[reportArgumentType]
        before = allocated()
        with coming(streamer):
            streamer.arrive()
            models.hidden_states(model, batch)  # the kernels' workspaces
        idle = allocated()
        torch.cuda.reset_peak_memory_stats()
        with coming(streamer):
            streamer.arrive()
            models.hidden_states(model, batch)
        peak = torch.cuda.max_memory_allocated() - idle
    rounding = BLOCK * len(tensors_of(model))
    assert allocated() == idle <= before + rounding + (64 << 20)
    activations = 40 * batch.input_ids.numel() * model.config.hidden_size * 4
    assert peak <= size_of(rest) + 2 * size_of(layers[0][1]) + rounding + activations


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["adamw", "adamw-8bit"])
def test_iterations_are_the_same_bit_for_bit(kind: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "adamw-8bit":
        pytest.importorskip("torchao")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        kept, moved = (made_with(x, dtype, kind=kind) for x in (OffloadConfig(), ALL))
        for _ in range(3):
            logged = [made.update(made.score(trajectories(device=DEVICE), SCORES)) for made in (kept, moved)]
            assert logged[0] == logged[1]
    finally:
        torch.use_deterministic_algorithms(False)
    a, b = ({name: x.cpu() for name, x in made.tensors().items()} for made in (kept, moved))
    assert equal_weights(a, b)


def test_after_a_phase_the_device_has_nothing_of_what_moves() -> None:
    """The policy's own bytes, and what an allocator rounds."""
    before = allocated()
    made = made_with(ALL, "bfloat16")
    policy = size_of(tensors_of(made.policy))
    rounding = 4 * BLOCK * len(tensors_of(made.policy)) + (64 << 20)  # and cuBLAS's workspace
    assert made.critic is not None and made.reference is not None
    for _ in range(3):
        rollout = made.generate(prompts())
        experience = made.score(rollout, SCORES)
        assert made.critic.device.type == "cuda" and made.reference.device.type == "cpu"
        made.update(experience)
        del rollout, experience
        assert all(x.device.type == "cpu" for model in (made.critic, made.reference) for _, x in tensors_of(model))
        states = made._policy.optimizer.state.values()
        assert all(x.device.type == "cpu" and x.is_pinned() for state in states for x in state.values())
        assert all(w.master.device.type == "cpu" for w in made._policy.weights.values())
        assert allocated() - before <= policy + rounding


def test_a_reward_model_comes_for_its_calls() -> None:
    reward = RewardModel(models.frozen(models.reward_model_from(models.to_device(tiny.policy(), DEVICE))))
    samples = to_samples(trajectories(), None)
    expected = reward(samples)
    reward.weights_at = of_frozen(reward.model, "move", DEVICE)
    for _ in range(3):
        assert reward.model.device.type == "cpu" and reward(samples) == expected


@pytest.mark.parametrize("fused", ["liger", "compile"])
def test_a_run_fuses_the_layers_of_models_that_are_away(fused: str, tmp_path: Path) -> None:
    if fused == "liger":
        pytest.importorskip("liger_kernel")
    away = {"reference": "stream", "critic": "move", "critic_optimizer": "move"}
    folder = train(
        runs.config(tmp_path, device="cuda", offload=away, layers={"fused": fused}, train={"total_steps": 2})
    )
    logged = [row for row in runs.rows(folder / "metrics.jsonl") if "val/ratio_max_first" in row]
    assert [row["val/ratio_max_first"] for row in logged] == [1.0, 1.0]
