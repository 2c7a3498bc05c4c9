"""Ways to fit end, and are found where there are some."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fastppo.memory import report, ways
from fastppo.memory.plan import Plan, Setting, make_plan
from fastppo.memory.setting import setting_of
from fastppo.memory.ways import Way, least, ways_to_fit
from test_memory import CUDA, plan_of, wide


def test_rows_are_halved_where_micro_batches_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values that are kept count in the update, which has one sequence at a time already."""
    run = wide(tmp_path, ppo={"num_minibatches": 1}, rollout={"keep_memory": True, "kv_gib": 0.5})
    setting = setting_of(run, CUDA)
    one = replace(setting, work=replace(setting.work, max_tokens=setting.work.longest))
    budget = (make_plan(one).needed + make_plan(least(setting)).needed) // 2
    tried: list[Setting] = []

    def counted(setting: Setting, budget: int | None = None) -> Plan:
        tried.append(setting)
        assert len(tried) < 500, "it does not end"
        return make_plan(setting, budget)

    whole = plan_of(run, budget)
    monkeypatch.setattr(ways, "make_plan", counted)
    first = ways_to_fit(run, whole)[0]
    assert first.plan.fits and first.keys.keys() >= {"rollout.max_rows", "ppo.max_tokens_per_microbatch"}


def test_what_one_sequence_at_a_time_cannot_a_whole_minibatch_may(tmp_path: Path) -> None:
    """A minibatch that is cut keeps its gradient beside the next backward pass."""
    run = wide(tmp_path)
    whole, cut = make_plan(setting_of(run, CUDA)), make_plan(least(setting_of(run, CUDA)))
    assert whole.needed < cut.needed
    budget = (whole.needed + cut.needed) // 2
    undone = wide(tmp_path, ppo={"num_minibatches": 4, "target_kl": 1.0, "roll_back": True})
    assert not plan_of(undone, budget).fits
    assert {"ppo.roll_back": False} in [way.keys for way in ways_to_fit(undone, plan_of(undone, budget))]


def test_a_way_that_gives_up_the_critic_has_no_other_keys_of_it() -> None:
    kinds: dict[str, object] = {f"{role}_optimizer.kind": "adamw-8bit" for role in ("policy", "critic")}
    moved: dict[str, object] = {f"offload.{key}": "move" for key in ("critic", "critic_optimizer", "policy_optimizer")}
    given_up: dict[str, object] = {"ppo.advantage": "reinforce++", "critic.init": "policy"}
    left = given_up | {"policy_optimizer.kind": "adamw-8bit", "offload.policy_optimizer": "move"}
    assert ways._of_those_left(given_up | kinds | moved) == left
    assert ways._of_those_left(kinds | moved) == kinds | moved


def test_a_way_is_printed_as_the_command_line_takes_it(tmp_path: Path) -> None:
    keys = {"train.async_save": False, "rollout.keep_memory": True, "rollout.max_rows": 8}
    said = report.flags(Way(keys, "", plan_of(wide(tmp_path))))
    assert said == "--train.no-async-save --rollout.keep-memory --rollout.max-rows 8"
    command = [sys.executable, "-m", "fastppo", "plan", "nothing.toml", *said.split()]
    assert "unknown" not in subprocess.run(command, capture_output=True, text=True, check=False).stderr
