"""A plan counts host memory: what moves there is pinned, optimizers may live there, checkpoints are written from it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastppo.checks import InputError
from fastppo.memory import host, report, start
from fastppo.memory.passes import sizes
from fastppo.memory.plan import GIB, Plan, make_plan
from fastppo.memory.setting import setting_of
from fastppo.memory.sizes import moment_tensors
from fastppo.memory.start import check_start, plan_run
from fastppo.memory.ways import ways_to_fit
from fastppo.saving import _in_host_memory
from test_memory import CPU, CUDA, plan_of, wide

ON_HOST = {f"{role}_optimizer": {"kind": "adamw-cpu-offload"} for role in ("policy", "critic")}
TIGHT = {"ppo": {"num_minibatches": 4, "target_kl": 1.0, "roll_back": True}}
UNSAVED = {"train": {"async_save": False}}


def limited(run: Any, memory: int, *, budget: int | None = None) -> Plan:
    return make_plan(replace(setting_of(run, CUDA), host_memory=memory), budget)


@pytest.mark.parametrize(("size", "taken"), [(0, 0), (1, 1), (4, 4), (5, 8), (3 << 20, 4 << 20), (1 << 30, 1 << 30)])
def test_a_pinned_tensor_takes_the_next_power_of_two(size: int, taken: int) -> None:
    assert host.pinned(size) == taken


def test_what_moves_takes_what_its_tensors_take_when_they_are_pinned(tmp_path: Path) -> None:
    """Of this shape, whose largest matrix has 3 * 2^29 numbers, more than it has on the device."""
    plan = plan_of(wide(tmp_path, offload={"reference": "move"}))
    matrices = 2 * (3 * 2**32 + 2 * 2**29 + 2 * 2**25) + 2 * 2**32  # MLP, q, o, k, v of two layers; embeddings and head
    assert plan.in_host_memory == pytest.approx(matrices, rel=1e-3)
    assert plan.in_host_memory > 1.2 * sizes(plan.setting.policy).weights


def test_an_optimizer_in_host_memory_counts_there(tmp_path: Path) -> None:
    """float32 weights, pinned, and two moments of every weight."""
    plan = plan_of(wide(tmp_path, **ON_HOST))
    trained = sum(sizes(x).gradients for x in (plan.setting.policy, plan.setting.critic) if x)
    assert 3 * trained < plan.in_host_memory < 4 * trained


def test_a_roll_back_of_an_optimizer_in_host_memory_takes_nothing_of_the_gpu(tmp_path: Path) -> None:
    here, there = plan_of(wide(tmp_path, **TIGHT)), plan_of(wide(tmp_path, **TIGHT, **ON_HOST))
    assert here.phases[-1].parts["roll-back copy"] == 3 * sizes(here.setting.policy).gradients
    assert there.phases[-1].parts["roll-back copy"] == 0
    alone = plan_of(wide(tmp_path, **ON_HOST))
    assert there.in_host_memory - alone.in_host_memory == 3 * sizes(here.setting.policy).gradients


def test_a_checkpoint_is_written_from_a_copy_of_all_that_learns(tmp_path: Path) -> None:
    plans = {saved: plan_of(wide(tmp_path, train={"async_save": saved})) for saved in (True, False)}
    parts = plans[True].phases[1].parts
    learned = sum(parts[name] for name in ("float32 masters", "optimizer moments", "critic weights", "policy weights"))
    assert plans[True].checkpoint_copy == pytest.approx(learned, rel=1e-3) and plans[False].checkpoint_copy == 0
    assert plans[True].phases == plans[False].phases
    on_cpu = [make_plan(setting_of(wide(tmp_path, train={"async_save": x}), CPU)).phases for x in (True, False)]
    more = [a.total - b.total for a, b in zip(*on_cpu, strict=True)]
    assert more == [0, *[plans[True].checkpoint_copy] * (len(more) - 1)]  # a load has nothing to write


def test_the_copy_that_is_planned_is_the_one_that_is_made(cases: Any, tmp_path: Path) -> None:
    """bfloat16 weights with masters, after a step; counters of steps are not planned."""
    case = replace(cases.CASES[3], num_layers=1)
    run = cases.config(case, tmp_path)
    engine, rewards = cases.build(run, case)
    rollout = engine.generate(cases.prompts_of(case))
    engine.update(engine.score(rollout, rewards(rollout)))
    copies: dict[object, torch.Tensor] = {}
    for tensors in (*engine.weights().values(), engine.tensors()):
        _in_host_memory(tensors, copies)
    made = sum(x.numel() * x.element_size() for x in copies.values() if x.ndim)
    setting = replace(setting_of(run, CPU), copies_to_save=True)
    assert host.checkpoint_copy(setting) == made


def test_a_run_is_refused_where_host_memory_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "memory_of", lambda device: GIB if device == CPU else None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 50, 1 << 50))
    said = r"holds .* GiB in host memory, 0.0 MiB of it .* there is 1.0 GiB: set some of offload.reference = 'keep'"
    with pytest.raises(InputError, match=said):
        check_start(wide(tmp_path, offload={"reference": "move"}, **UNSAVED), CUDA, 512)
    with pytest.raises(InputError, match=r"policy_optimizer.kind = 'adamw', critic_optimizer.kind = 'adamw'"):
        check_start(wide(tmp_path, **ON_HOST, **UNSAVED), CUDA, 512)
    with pytest.raises(InputError, match=r"set some of train.async_save = false"):
        check_start(wide(tmp_path), CUDA, 512)
    assert check_start(wide(tmp_path, **UNSAVED), CUDA, 512).fits


def test_a_plan_for_this_machine_asks_for_its_host_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = wide(tmp_path, offload={"reference": "move"}, **UNSAVED)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(start, "memory_of", lambda device: GIB if device == CPU else 1 << 50)
    monkeypatch.setattr(start, "ways_to_fit", lambda config, plan: [])
    made, _ = plan_run(run, None)
    assert not made.fits and "more than host memory" in report.verdict(made)
    assert plan_run(run, "2000000GB")[0].fits  # of a machine that is not here nothing is known


def test_a_way_that_host_memory_is_too_small_for_is_not_offered(tmp_path: Path) -> None:
    small = {"ppo": {"num_minibatches": 4, "max_tokens_per_microbatch": 1024}, "rollout": {"max_rows": 1}}
    run = wide(tmp_path, **small, **UNSAVED)
    budget = plan_of(wide(tmp_path, **small, offload={"reference": "move"})).needed
    ample, little = (ways_to_fit(run, limited(run, memory, budget=budget)) for memory in (1 << 50, GIB))
    assert ample[0].keys == {"offload.reference": "move"}
    assert not any(key.startswith("offload.") for way in little for key in way.keys)


@pytest.mark.parametrize("kind", ["adamw", "adamw-8bit"])
def test_moments_are_listed_tensor_by_tensor(kind: str) -> None:
    found = moment_tensors(1 << 20, kind)
    assert found == {"adamw": [4 << 20] * 2, "adamw-8bit": [1 << 20, 4 << 12, 1024] * 2}[kind]
