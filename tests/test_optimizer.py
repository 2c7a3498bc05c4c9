"""The optimizer: schedules, Adam's first step, bfloat16 weights, clipping, and steps that are skipped."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import tiny
from batches import (
    SCORES,
    bfloat16,
    engine,
    equal_weights,
    trajectories,
    weights,
    with_random_head,
)
from fastppo import OptimizerConfig, PPOEngine
from fastppo.masters import gradients_where_masters_are
from fastppo.optimizer import learning_rate_factor


def step(made: PPOEngine, seed: int = 0) -> dict[str, float]:
    return made.update(made.score(trajectories(seed=seed), SCORES))


@pytest.mark.parametrize(
    ("settings", "trace"),
    [
        ({"schedule": "constant"}, [1.0, 1.0, 1.0, 1.0]),
        ({"schedule": "linear"}, [1.0, 0.75, 0.5, 0.25]),
        ({"schedule": "cosine"}, [1.0, 0.8535533906, 0.5, 0.1464466094]),
        ({"schedule": "constant", "warmup_steps": 2}, [0.5, 1.0, 1.0, 1.0]),
        ({"schedule": "linear", "warmup_steps": 4}, [0.25, 0.375, 0.375, 0.25]),
    ],
    ids=str,
)
def test_learning_rate_follows_iterations_not_steps(settings: dict[str, Any], trace: list[float]) -> None:
    """CORRECTNESS D4: once per iteration, however many minibatches; the first one learns."""
    made = engine(
        ppo={"num_epochs": 2, "num_minibatches": 2}, optimizer={"lr": 1e-3, **settings}, total_steps=len(trace)
    )
    assert [step(made)["policy/lr"] for _ in trace] == pytest.approx([1e-3 * x for x in trace])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_decaying_schedules_end_at_zero(schedule: Any) -> None:
    assert learning_rate_factor(OptimizerConfig(schedule=schedule), 7, 7) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("settings", [{"schedule": "constant"}, {"schedule": "linear"}, {"warmup_steps": 10}], ids=str)
def test_the_first_iteration_moves_the_weights(settings: dict[str, Any]) -> None:
    """CORRECTNESS D4, P25."""
    made = engine(optimizer=settings)
    before = weights(made.policy)
    step(made)
    assert not equal_weights(weights(made.policy), before)


def test_first_step_of_adam_has_eps_outside_the_root() -> None:
    """CORRECTNESS D3: |g| = 1e-4 and eps = 1e-5 move .909 of the rate."""
    made = engine(optimizer={"lr": 1e-3, "eps": 1e-5, "max_grad_norm": None})
    before = weights(made.policy)
    for p in made.policy.parameters():
        p.grad = torch.full_like(p, 1e-4)
    made._policy.step()
    for name, p in made.policy.named_parameters():
        torch.testing.assert_close(before[name] - p, torch.full_like(p, 0.909e-3), atol=1e-6, rtol=0)


def test_bfloat16_weights_take_steps_far_below_their_rounding() -> None:
    """CORRECTNESS D13: 1000 steps of 1e-6 move a weight of 1 by 1e-3."""
    made = engine(bfloat16(tiny.policy()), optimizer={"lr": 1e-6, "eps": 1e-12, "max_grad_norm": None})
    masters = [w.master for w in made._policy.weights.values()]
    for master in masters:
        master.fill_(1.0)
    for _ in range(1000):
        for master in masters:
            master.grad = torch.ones_like(master)
        made._policy.step()
    for master, p in zip(masters, made.policy.parameters(), strict=True):
        torch.testing.assert_close(master, torch.full_like(master, 1 - 1e-3), atol=2e-5, rtol=0)
        assert p.dtype == torch.bfloat16 and torch.equal(p, master.bfloat16())


def test_gradients_are_clipped_to_their_global_norm() -> None:
    """CORRECTNESS D6: the norm that is reported is the one before."""
    made = engine(optimizer={"max_grad_norm": 0.5})
    for p in made.policy.parameters():
        p.grad = torch.ones_like(p)
    count = sum(p.numel() for p in made.policy.parameters())
    squares: list[float] = []
    made._policy.optimizer.register_step_pre_hook(
        lambda *_: squares.append(sum(float(p.grad.square().sum()) for p in made.policy.parameters()))  # pyright: ignore
    )
    assert made._policy.step() == pytest.approx(count**0.5, rel=1e-5)
    assert squares == pytest.approx([0.25], rel=1e-4)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("role", ["policy", "critic"])
def test_a_gradient_that_is_not_finite_is_skipped(role: str, value: float) -> None:
    """CORRECTNESS P18, D6: that model's weights and optimizer stay, it is counted, and the run goes on."""
    made = with_random_head(engine())
    model: Any = getattr(made, role)
    hook = model.model.norm.weight.register_hook(lambda grad: torch.full_like(grad, value))
    before = {r: weights(getattr(made, r)) for r in ("policy", "critic")}
    metrics = step(made)
    hook.remove()
    for name in ("policy", "critic"):
        assert equal_weights(weights(getattr(made, name)), before[name]) == (name == role)
        assert metrics[f"{name}/skipped_steps"] == float(name == role)
    assert not any(getattr(made, f"_{role}").optimizer.state.values())
    step(made)
    assert not equal_weights(weights(model), before[role])
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_gradient_is_in_host_memory_when_its_own_gpu_has_copied_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another GPU is the current one, whose stream knows nothing of the copy."""
    asked: list[Any] = []
    event = SimpleNamespace(record=lambda *streams: asked.extend(streams), synchronize=lambda: asked.append("waited"))
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    second = torch.device("cuda", 1)
    with FakeTensorMode() as mode:
        gradient = FakeTensor(mode, torch.empty(3, device="meta"), second)
        weight: Any = SimpleNamespace(gradient=SimpleNamespace(grad=gradient), master=torch.empty(3))
        ((_, there),) = gradients_where_masters_are([weight])
    assert there.device.type == "cpu" and asked == [second, "waited"]
