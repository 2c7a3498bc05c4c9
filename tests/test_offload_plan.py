"""A plan knows who is on the device when, and offers to send away what is not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig

import runs
import tiny
from fastppo import RewardModel, models
from fastppo.checks import InputError
from fastppo.config import MemoryConfig
from fastppo.config_inputs import RewardConfig
from fastppo.config_offload import OffloadConfig
from fastppo.memory import report
from fastppo.memory.plan import GIB, Plan
from fastppo.memory.presence import holdings
from fastppo.memory.setting import setting_of
from fastppo.memory.ways import _offloads, changed, ways_to_fit
from fastppo.offload.mover import Kept, Mover
from fastppo.rewards import load_rewards
from test_memory import CPU, CUDA, plan_of, wide

ALL = {key: "move" for key in ("reference", "critic", "critic_optimizer", "policy_optimizer")}


def weights_in(plan: Plan) -> dict[str, set[str]]:
    """By phase, the roles whose weights are on the device."""
    return {
        phase.name: {name.removesuffix(" weights") for name in phase.parts if "weights" in name}
        for phase in plan.phases
    }


@pytest.mark.parametrize(
    "name",
    [pytest.param("full, bfloat16, everything moves", marks=pytest.mark.slow), "full, reference and reward stream"],
)
def test_every_phase_takes_what_was_planned_where_roles_move(name: str, cases: Any, tmp_path: Path) -> None:
    """On a CPU, where host memory is the same memory and is measured with it."""
    case = next(case for case in cases.CASES if case.name == name)
    run = cases.config(case, tmp_path)
    used, plan = cases.measured(run, case), cases.planned(run)
    for phase in plan.phases[1:]:
        assert phase.total + plan.in_host_memory == pytest.approx(used[phase.name].peak, rel=0.05), phase
    assert used["load"].peak <= 1.02 * (plan.phases[0].total + plan.in_host_memory)


def test_a_role_that_moves_is_counted_where_it_is_used_alone(tmp_path: Path) -> None:
    classifier = runs.checkpoint(tmp_path / "reward", kind=AutoModelForSequenceClassification)
    rewards = [{"kind": "model", "target": classifier, "dtype": "bfloat16"}]
    kept, moved = (plan_of(wide(tmp_path, rewards=rewards, offload=x)) for x in ({}, {**ALL, "reward": "move"}))
    everyone = {"policy", "critic", "reference", "reward"}
    assert weights_in(kept) == dict.fromkeys(("load", "rollout", "reward", "score", "update"), everyone)
    there = weights_in(moved)
    assert there["rollout"] == {"policy"} and there["reward"] == {"policy", "reward"}
    assert there["score"] == {"policy", "reference", "critic"}
    assert there["update"] in ({"policy"}, {"policy", "critic"})
    before, after = kept.phases[-1].parts, moved.phases[-1].parts
    for name in ("optimizer moments", "float32 masters"):
        assert after[name] == pytest.approx(before[name] / 2, rel=0.2)
        assert "optimizer moments" not in moved.phases[1].parts
    assert moved.in_host_memory > 12 * GIB and kept.in_host_memory == 0 and moved.needed < kept.needed
    assert "wait in host memory" in report.verdict(moved) and "wait in" not in report.verdict(kept)


def test_a_streamed_model_takes_two_layers_where_one_that_moves_takes_all(tmp_path: Path) -> None:
    """Beside embeddings and head, and in the phase that uses it alone; one that stays is everywhere."""
    plans = {}
    for way in ("keep", "move", "stream"):
        run = wide(tmp_path, policy={"path": str(tmp_path / "deep")}, offload={"reference": way})
        shape = LlamaConfig.from_pretrained(tmp_path)
        shape.num_hidden_layers, shape.vocab_size = 9, 1000
        shape.save_pretrained(tmp_path / "deep")
        plans[way] = {phase.name: phase for phase in plan_of(run).phases}
    layer = 2 * (3 * 16384 * 98304 + 2 * 16384**2 + 2 * 16384 * 1024 + 2 * 16384)
    rest = 2 * (2 * 1000 * 16384 + 16384)
    sizes = {way: phases["score"].parts["reference weights"] for way, phases in plans.items()}
    assert sizes["keep"] == sizes["move"] == pytest.approx(rest + 9 * layer, rel=1e-6)
    assert sizes["stream"] == pytest.approx(rest + 2 * layer, rel=1e-6)
    totals = [plans[way]["score"].total for way in ("stream", "move", "keep")]
    assert totals[0] < totals[1] <= totals[2]
    assert plans["stream"]["update"] == plans["move"]["update"]
    assert plans["keep"]["update"].total - plans["move"]["update"].total == sizes["keep"]


@pytest.mark.parametrize("sent", [["reference"], ["critic_optimizer", "policy_optimizer"], [*ALL]])
def test_what_fits_by_sending_away_what_waits_gives_up_nothing_else(sent: list[str], tmp_path: Path) -> None:
    """The first way; and no more is sent away than it takes."""
    small = {"ppo": {"num_minibatches": 4, "max_tokens_per_microbatch": 1024}, "rollout": {"max_rows": 1}}
    run = wide(tmp_path, **small)
    budget = plan_of(wide(tmp_path, **small, offload=dict.fromkeys(sent, "move"))).needed
    first = ways_to_fit(run, plan_of(run, budget))[0]
    assert all(key.startswith("offload.") for key in first.keys), first.keys
    assert first.plan.fits and "same results" in first.cost and len(first.keys) <= len(sent)
    for key in first.keys:
        fewer = {name: value for name, value in first.keys.items() if name != key}
        assert not plan_of(changed(run, fewer), budget).fits


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_a_cpu_is_not_offered_what_it_cannot_do(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    monkeypatch.setattr("fastppo.memory.ways._tried", lambda config, keys, plan: tried.extend(keys))
    run = wide(tmp_path)
    ways_to_fit(run, Plan(setting_of(run, device), (), budget=1))
    assert tried and any(key.startswith("offload.") for key in tried) == (device == CUDA)


def test_every_key_of_the_group_is_offered_or_needs_none() -> None:
    """A key that is added must be thought of where ways out are listed."""
    assert {*ALL, "reward"} == {key for key in OffloadConfig.__dataclass_fields__}


def test_a_reward_that_is_an_adapter_stays_and_a_model_beside_it_moves(tmp_path: Path) -> None:
    """The adapter is on the policy's base; alone it has nothing to send away, and no way to fit says so."""
    pytest.importorskip("peft")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    full = runs.checkpoint(tmp_path / "reward", kind=AutoModelForSequenceClassification)
    rewards = [{"kind": "model", "target": str(tmp_path / "adapter"), "name": "adapter"}]
    tables: dict[str, Any] = {"memory": {"share": "lora"}, "rewards": rewards}
    with pytest.raises(InputError, match="offload.reward = 'move' needs a reward model with weights of its own"):
        plan_of(wide(tmp_path, **tables, offload={"reward": "move"}))
    keys = [key for change in _offloads(wide(tmp_path, **tables)) for key in change.keys]
    assert "offload.reward" not in keys and "offload.policy_optimizer" in keys
    rewards += [{"kind": "model", "target": full, "dtype": "float32"}]
    plan = plan_of(wide(tmp_path, **tables, offload={"reward": "move"}))
    sizes = [sum(x.whole.values()) for x in holdings(plan.setting) if x.name.startswith("reward")]
    assert 0 < plan.in_host_memory < 2.5 * sizes[1]  # pinned
    assert plan.phases[1].parts["reward weights"] == sizes[0]


@pytest.mark.parametrize("adapter", [False, True])
def test_rewards_load_as_they_are_planned(adapter: bool, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    policy = models.adapt(tiny.policy(), MemoryConfig(share="lora", lora_rank=4))
    model = models.reward_model_from(models.bare(policy))
    if adapter:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules="all-linear"))
    model.save_pretrained(str(tmp_path))
    config = RewardConfig(kind="model", target=str(tmp_path), dtype="float32")
    (reward,) = load_rewards([config], None, CPU, base=policy, offload="move").rewards
    assert isinstance(reward, RewardModel) and isinstance(reward.weights_at, Kept if adapter else Mover)
