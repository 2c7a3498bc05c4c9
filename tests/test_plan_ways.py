"""Ways to fit end, and are found where there are some."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from fastppo.cli import parse_run
from fastppo.memory import report, ways
from fastppo.memory.plan import Plan, Setting, make_plan
from fastppo.memory.setting import setting_of
from fastppo.memory.start import refusal
from fastppo.memory.ways import Way, changed, least, ways_to_fit
from fastppo.run_file import to_dict
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


def test_a_package_that_is_not_installed_hides_no_other_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, found = wide(tmp_path), importlib.util.find_spec
    budget = make_plan(setting_of(run, CUDA)).needed // 2
    hidden = {"peft", "torchao"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *at: None if name in hidden else found(name, *at))
    offered = ways_to_fit(run, plan_of(run, budget))
    assert offered and not any("memory.share" in way.keys for way in offered)
    packed = [way.cost for way in offered if "policy_optimizer.kind" in way.keys]
    assert packed and all("pip install 'fastppo[torchao]'" in cost for cost in packed)
    hopeless = plan_of(run, 2**30)
    assert not ways_to_fit(run, hopeless) and "pip install 'fastppo[lora]'" in refusal(hopeless, [])
    report.show(hopeless, [])
    assert "pip install 'fastppo[lora]'" in capsys.readouterr().out.replace("\n", "")
    monkeypatch.undo()
    assert "fastppo[lora]" not in refusal(hopeless, [])


@pytest.mark.parametrize("written", ["keep", "move"])
@pytest.mark.parametrize(
    ("given_up", "offloaded"), [("ppo.advantage", {"critic", "critic_optimizer"}), ("ppo.kl_coef", {"reference"})]
)
def test_a_model_that_is_given_up_is_moved_no_longer(
    given_up: str, offloaded: set[str], written: str, tmp_path: Path
) -> None:
    """Nor has it an optimizer: what is offered is a legal run, whatever was in host memory before."""
    run = wide(tmp_path, offload={**dict.fromkeys(offloaded, written), "policy_optimizer": "keep"})
    changes = [*ways._offloads(run), *ways._changes(run, "cuda")]
    (change,) = [c for c in changes if given_up in c.keys]
    others = [c for c in changes if c is not change and not ways._alternatives((c, change))]
    made = [ways._of_those_left({**other.keys, **change.keys}) for other in others]
    legal = [changed(run, keys) for keys in made if "memory.share" not in keys]
    assert legal and all(c.offload.chosen.keys().isdisjoint(offloaded) for c in legal)
    assert not any(key.startswith("critic_optimizer.") for keys in made for key in keys if given_up == "ppo.advantage")


def test_a_way_is_printed_as_the_command_line_takes_it(tmp_path: Path) -> None:
    keys = {"train.async_save": False, "rollout.keep_memory": True, "rollout.max_rows": 8}
    run = wide(tmp_path)
    said = report.flags(Way(keys, "", plan_of(run)))
    assert said == "--train.no-async-save --rollout.keep-memory --rollout.max-rows 8"
    (tmp_path / "run.json").write_text(json.dumps(to_dict(run)))
    read = parse_run(str(tmp_path / "run.json"), said.split(), "plan")
    assert read == changed(run, keys) != run
