"""A run that stopped and went on ends as the run that never stopped, and a checkpoint is whole or it is not used."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import runs
from fastppo import PPOEngine, RewardError, checkpoint, train
from fastppo.metrics import rewind
from fastppo.resume import LATEST
from fastppo.run import move_aside, open_folder

STEPS = 6
NOISY = [{"kind": "function", "target": "runs:noisy"}]
SETTINGS: dict[str, dict[str, Any]] = {
    "adaptive": {
        "ppo": {"kl_coef": 0.1, "kl_target": 0.5, "kl_horizon": 20, "normalize_scores": True},
        "policy_optimizer": {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 3},
    },
    "bfloat16": {"policy": {"dtype": "bfloat16"}, "ppo": {"critic_warmup_steps": 3, "max_tokens_per_microbatch": 32}},
    "kl-penalty": {"ppo": {"objective": "kl-penalty", "target_kl": 1.0, "roll_back": True}},
    "critic-free": {"ppo": {"advantage": "grpo"}, "rollout": {"samples_per_prompt": 2}},
}


def config(folder: Path, name: str = "adaptive", **changes: Any) -> Any:
    train_settings = {"total_steps": STEPS, "eval_every": 3, "save_every": 2, "keep_last": 0}
    tables = {"rewards": NOISY, "train": train_settings, **SETTINGS[name]}
    tables["policy"] = {"path": runs.checkpoint(folder / "policy"), **tables.get("policy", {})}
    return runs.config(folder, **runs.merged(tables, changes))


def without_times(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith(("time", "perf"))} for row in runs.rows(path)]


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit: weights, optimizer moments, every logged number, every sample."""
    assert without_times(a / "metrics.jsonl") == without_times(b / "metrics.jsonl")
    final = [load_file(folder / "checkpoints" / "final" / "state.safetensors") for folder in (a, b)]
    assert final[0].keys() == final[1].keys() and all(torch.equal(x, final[1][name]) for name, x in final[0].items())
    assert without_times(a / "metrics.jsonl") == without_times(b / "metrics.jsonl")
    assert (a / "samples.jsonl").read_text() == (b / "samples.jsonl").read_text()


def back_to(folder: Path, step: int) -> None:
    """As if the run had died after writing checkpoint `step`."""
    for path in (folder / "checkpoints").iterdir():
        if path.name != f"step-{step:06d}":
            shutil.rmtree(path)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_run_is_the_undisturbed_run(name: str, tmp_path: Path) -> None:
    """CORRECTNESS D14: generators, KL controller, running statistics, prompt position, optimizers, schedules."""
    undisturbed = train(config(tmp_path, name))
    for step in (2, 4):
        shutil.copytree(undisturbed, tmp_path / f"from-{step}")
        back_to(tmp_path / f"from-{step}", step)
        assert_same_run(undisturbed, train(config(tmp_path, name, out=str(tmp_path / f"from-{step}")), resume=LATEST))


@pytest.mark.parametrize("state", ["engine", "prompts", "rng"])
def test_the_comparison_sees_a_state_that_is_not_restored(state: str, tmp_path: Path) -> None:
    folder = train(config(tmp_path))
    shutil.copytree(folder, tmp_path / "other")
    back_to(tmp_path / "other", 2)
    numbers_path = tmp_path / "other" / "checkpoints" / "step-000002" / "state.json"
    numbers, other = (
        json.loads(numbers_path.read_text()),
        json.loads((folder / "checkpoints" / "step-000004" / "state.json").read_text()),
    )
    rewrite(numbers_path, {**numbers, state: other[state]})
    resumed = train(config(tmp_path, out=str(tmp_path / "other")), resume=LATEST)
    with pytest.raises(AssertionError):
        assert_same_run(folder, resumed)


def rewrite(path: Path, numbers: Any) -> None:
    """Change state.json so that the checksum still fits."""
    path.write_text(json.dumps(numbers))
    sums = json.loads((path.parent / "checksums.json").read_text())
    (path.parent / "checksums.json").write_text(json.dumps({**sums, path.name: checkpoint._sha256(path)}))


def test_a_failed_reward_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on from the iteration that failed, not from the last scheduled checkpoint."""
    undisturbed = train(config(tmp_path))
    for moment in range(3, 6):  # in an iteration, in the evaluation after it, in the next iteration
        runs.calls.clear()
        monkeypatch.setattr(runs, "fails_at", moment)
        changed = config(tmp_path, out=str(tmp_path / f"failed-{moment}"), train={"save_every": 0})
        with pytest.raises(RewardError):
            train(changed)
        monkeypatch.setattr(runs, "fails_at", None)
        assert_same_run(undisturbed, train(changed, resume=LATEST))


@pytest.mark.slow
def test_sigkill_loses_nothing_but_time(tmp_path: Path) -> None:
    undisturbed = train(config(tmp_path, train={"total_steps": 12}))
    path = tmp_path / "run.toml"
    tables = runs.settings(tmp_path, **json.loads(json.dumps({"rewards": NOISY, **SETTINGS["adaptive"]})))
    tables = runs.merged(
        tables, {"out": str(tmp_path / "killed"), "train": {"total_steps": 12, "eval_every": 3, "save_every": 2}}
    )
    path.write_text(runs.toml(tables), encoding="utf-8")
    for until in (2, 5, None):
        process = start(path)
        while until and process.poll() is None and lines(tmp_path / "killed") < until + 2:
            time.sleep(0.01)
        if until:
            process.send_signal(signal.SIGKILL)
        out, err = process.communicate(timeout=120)
        assert process.returncode == (-signal.SIGKILL if until else 0), err
    assert "resume: going on after iteration" in out
    assert_same_run(undisturbed, tmp_path / "killed")


def lines(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def start(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fastppo", "train", str(path), "--resume"]
    return subprocess.Popen(
        command, cwd=Path(__file__).parent, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [Path.unlink, cut_in_half, flip_a_bit])
@pytest.mark.parametrize("file", ["state.safetensors", "state.json", "checksums.json", "policy/model.safetensors"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    damage: Callable[[Path], None], file: str, small: Path, tmp_path: Path, capsys: Any
) -> None:
    shutil.copytree(small, tmp_path / "checkpoints")
    damage(tmp_path / "checkpoints" / "step-000004" / file)
    found, passed_over = checkpoint.newest(tmp_path / "checkpoints")
    assert found is not None and found.path.name == "step-000002"
    (reason,) = passed_over
    assert "step-000004" in reason and ("damaged" in reason or "missing" in reason or "cannot read" in reason)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of iterations 2 and 4."""
    folder = tmp_path_factory.mktemp("small")
    train(config(folder, train={"total_steps": 4}))
    shutil.rmtree(folder / "run" / "checkpoints" / "final")
    return folder / "run" / "checkpoints"


def test_a_rename_that_was_killed_loses_no_checkpoint(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "step-000004").rename(tmp_path / "checkpoints" / ".step-000004.old")
    shutil.copytree(small / "step-000002", tmp_path / "checkpoints" / ".step-000006.partial")
    found, _ = checkpoint.newest(tmp_path / "checkpoints")
    assert found is not None and found.step == 4


def test_a_full_disk_leaves_the_checkpoint_before(small: Path, tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "final"
    shutil.copytree(small / "step-000002", folder)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write(folder, lambda path: path.mkdir(), {"step": 3}, {})
    assert checkpoint.read(folder).step == 2 and [p.name for p in tmp_path.iterdir()] == ["final"]


CHANGES = [
    ({"ppo": {"clip_low": 0.1}}, "ppo.clip_low was 0.2, is 0.1"),
    ({"train": {"total_steps": 7}}, "train.total_steps was 6, is 7"),
    (
        {"rewards": [{"kind": "function", "target": "runs:digits"}]},
        "rewards.0.target was 'runs:noisy', is 'runs:digits'",
    ),
]


@pytest.mark.parametrize(("changes", "fragment"), CHANGES)
def test_a_config_that_means_another_run_is_refused(changes: Any, fragment: str, tmp_path: Path) -> None:
    folder = train(config(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(ValueError, match=re.escape(fragment)):
        train(config(tmp_path, **changes), resume=LATEST)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_other_prompts_are_refused(tmp_path: Path) -> None:
    changed = config(tmp_path)
    train(changed)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1="}\n' * runs.NUM_PROMPTS)
    with pytest.raises(ValueError, match="the prompts of .*prompts.jsonl' are not those the run began with"):
        train(changed, resume=LATEST)


def test_resume_without_a_checkpoint_starts_the_run(tmp_path: Path, capsys: Any) -> None:
    """What a job scheduler needs: one command for the first start and every later one."""
    train(config(tmp_path, train={"total_steps": 2}), resume=LATEST)
    assert "no whole checkpoint in" in capsys.readouterr().out


def test_a_run_can_be_made_longer_under_a_constant_rate(tmp_path: Path) -> None:
    constant: dict[str, Any] = {
        "policy_optimizer": {"schedule": "constant"},
        "critic_optimizer": {"schedule": "constant"},
    }
    longer = {"train": {"total_steps": 8}, **constant}
    a = train(config(tmp_path, out=str(tmp_path / "a"), **longer))
    train(config(tmp_path, out=str(tmp_path / "b"), **constant))
    b = train(config(tmp_path, out=str(tmp_path / "b"), **longer), resume=LATEST)
    assert_same_run(a, b)


def test_only_the_last_checkpoints_stay(tmp_path: Path) -> None:
    folder = train(config(tmp_path, train={"save_every": 1, "keep_last": 2}))
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["final", "step-000005", "step-000006"]


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    lock = open_folder(folder)
    assert lock is not None
    with pytest.raises(ValueError, match="another process trains in"):
        train(config(tmp_path))
    with pytest.raises(ValueError, match="another process trains in"):
        move_aside(folder)
    lock.close()
    move_aside(folder)
    assert not folder.exists()


def test_a_run_folder_in_place_of_a_checkpoint_names_its_checkpoints(tmp_path: Path) -> None:
    folder = train(config(tmp_path, train={"save_every": 2}))
    with pytest.raises(ValueError, match=r"run is a run folder: give one of its checkpoints/, final, step-000002"):
        train(config(tmp_path, train={"save_every": 2}), resume=str(folder))


def test_resume_takes_over_no_folder_of_another_run(tmp_path: Path) -> None:
    """Neither one that died before its first checkpoint, nor one that `--resume DIR` does not name."""
    one = train(config(tmp_path, train={"save_every": 2}))
    other = train(config(tmp_path, out=str(tmp_path / "other"), seed=7))
    shutil.rmtree(other / "checkpoints")
    before = {path: path.stat().st_mtime_ns for path in other.rglob("*")}
    with pytest.raises(ValueError, match=r"other' is of another run: seed was 7, is 1\."):
        train(config(tmp_path, out=str(other)), resume=LATEST)
    with pytest.raises(ValueError, match="other' already holds a run"):
        train(config(tmp_path, out=str(other)), resume=str(one / "checkpoints" / "step-000002"))
    assert {path: path.stat().st_mtime_ns for path in other.rglob("*")} == before


def test_rows_after_the_checkpoint_are_moved_not_lost(tmp_path: Path) -> None:
    rows = [f'{{"step": {i}, "episode": {i}}}\n' for i in range(4)]
    (tmp_path / "metrics.jsonl").write_text("".join(rows) + '{"step"')
    rewind(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(rows[:2])
    assert (tmp_path / "metrics.dropped.jsonl").read_text() == "".join(rows[2:]) + '{"step"\n'


def test_checkpoints_of_an_abandoned_future_are_set_aside(tmp_path: Path) -> None:
    """Else a later --resume would jump onto them, and pruning would take them for the last ones."""
    folder = train(config(tmp_path, train={"save_every": 2}))
    second = folder / "checkpoints" / "step-000002"
    runs.calls.clear()
    runs_on = config(tmp_path, train={"save_every": 3, "keep_last": 1})
    train(runs_on, resume=str(second))
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert names[-2:] == ["final", "step-000006"] and all(n.startswith("abandoned-") for n in names[:-2])
    assert len([n for n in names if n.startswith("abandoned-")]) == 3  # step-000004, step-000006 and final


def test_an_interruption_inside_an_update_leaves_what_can_be_resumed(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    whole = PPOEngine.update

    def fails_in_the_third(self: PPOEngine, *args: Any) -> Any:
        if self.version == 2:
            raise RuntimeError("out of memory")
        return whole(self, *args)

    monkeypatch.setattr(PPOEngine, "update", fails_in_the_third)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            train(config(tmp_path, train={"save_every": 2}), resume=LATEST)
        assert "interrupted-weights (weights alone; --resume goes on from the newest other" in capsys.readouterr().out
    monkeypatch.undo()
    train(config(tmp_path, train={"save_every": 2}), resume=LATEST)
    assert "going on after iteration 2" in capsys.readouterr().out


def test_a_run_out_of_memory_may_go_on_in_smaller_portions(tmp_path: Path, capsys: Any) -> None:
    folder = train(config(tmp_path, train={"save_every": 2}))
    shutil.rmtree(folder / "checkpoints" / "final")
    shutil.rmtree(folder / "checkpoints" / "step-000006")
    train(config(tmp_path, train={"save_every": 2}, ppo={"max_tokens_per_microbatch": 64}), resume=LATEST)
    assert "resume: ppo.max_tokens_per_microbatch changed: not bit for bit" in capsys.readouterr().out
