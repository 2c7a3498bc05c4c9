"""A whole run: what it writes is complete and loads, what is sampled is trained on, and no end loses the weights."""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

import runs
from batches import equal_weights, weights
from fastppo import PPOEngine, RewardError, RunConfig, checkpoint, demo, train
from fastppo.run_file import from_dict
from fastppo.stop import ONE_REQUEST, stop_requests

TRL_NAMES = {  # of trl.PPOTrainer's log, where both have the quantity
    "objective/kl", "objective/entropy", "objective/scores", "objective/rlhf_reward", "policy/approxkl_avg",
    "policy/clipfrac_avg", "loss/policy_avg", "loss/value_avg", "val/clipfrac_avg", "val/ratio", "val/ratio_var",
    "val/num_eos_tokens", "episode",
}  # fmt: skip
STEPS = 4
NOTHING_SAVED = "before the end of the first iteration: nothing was trained, so nothing is saved\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of one run with a function, a reward model, evaluations, checkpoints and TensorBoard."""
    folder = tmp_path_factory.mktemp("run")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    runs.calls.clear()
    assert train(whole(folder)) == folder / "run"
    torch.set_num_threads(threads)
    yield folder / "run"


def whole(folder: Path, **changes: Any) -> RunConfig:
    reward = runs.checkpoint(folder / "rm", kind=AutoModelForSequenceClassification, seed=1)
    function = {"kind": "function", "target": "runs:digits", "weight": 0.5}
    rewards = [function, {"kind": "model", "target": reward, "weight": -2.0}]
    settings = {"total_steps": STEPS, "eval_every": 3, "save_every": 2, "loggers": ["tensorboard"], **changes}
    return runs.config(folder, rewards=rewards, train=settings, critic={"init": "reward"})


def iterations(folder: Path) -> list[dict[str, Any]]:
    return [row for row in runs.rows(folder / "metrics.jsonl") if "episode" in row]


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [row for row in runs.rows(folder / "metrics.jsonl") if "eval/scores" in row]


def test_every_iteration_is_one_line_of_finite_numbers(run: Path) -> None:
    rows = iterations(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and [row["episode"] for row in rows] == [4, 8, 12, 16]
    assert all(TRL_NAMES <= row.keys() == rows[0].keys() for row in rows)
    assert all(abs(value) < float("inf") for row in rows for value in row.values())
    assert {"time/rollout", "time/reward", "time/score", "time/update"} <= rows[0].keys()


def test_all_that_is_sampled_is_scored_and_trained_on(run: Path) -> None:
    """CORRECTNESS P25: and every prompt comes equally often."""
    training = [samples for samples in runs.calls if len(samples) == 4]
    assert len(training) == STEPS
    for row, samples in zip(iterations(run), training, strict=True):
        assert row["rollout/trained_tokens"] == sum(len(s.response_ids) for s in samples)
        assert row["val/num_eos_tokens"] == sum(s.finish_reason == "stop" for s in samples)
        assert row["policy/steps"] == 4  # two epochs of two minibatches
    counts = Counter(s.record["answer"] for samples in training[:3] for s in samples)
    assert list(counts.values()) == [2] * runs.NUM_PROMPTS


def test_every_reward_is_logged_and_weighted(run: Path) -> None:
    for prefix, total, rows in (("reward", "objective", iterations(run)), ("eval/reward", "eval", evaluations(run))):
        for row in rows:
            expected = 0.5 * row[f"{prefix}/digits"] - 2.0 * row[f"{prefix}/rm"]
            assert row[f"{total}/scores"] == pytest.approx(expected, abs=1e-5)


def test_every_evaluation_writes_its_samples(run: Path) -> None:
    """Before the first iteration, on schedule, and after the last."""
    rows = runs.rows(run / "samples.jsonl")
    assert [row["step"] for row in evaluations(run)] == [0, 3, 4]
    assert Counter(row["step"] for row in rows) == dict.fromkeys((0, 3, 4), runs.NUM_PROMPTS)
    for evaluation in evaluations(run):
        mine = [row for row in rows if row["step"] == evaluation["step"]]
        mean = sum(row["score"] for row in mine) / len(mine)
        assert evaluation["eval/scores"] == pytest.approx(mean, abs=1e-5)
        assert [row["prompt"] for row in mine] == [f"{i}+{i}=" for i in range(runs.NUM_PROMPTS)]
        cut = sum(row["finish_reason"] == "length" for row in mine)
        assert evaluation["eval/truncated_frac"] == pytest.approx(cut / len(mine))


def test_config_file_is_the_config(run: Path) -> None:
    assert from_dict(RunConfig, json.loads((run / "config.json").read_text())) == whole(run.parent)


def test_checkpoints_load_and_follow_training(run: Path) -> None:
    folders = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert folders == ["final", "step-000002", "step-000004"]
    loaded = {name: load(run / "checkpoints" / name) for name in folders}
    initial = weights(AutoModelForCausalLM.from_pretrained(run.parent / "policy"))
    assert not equal_weights(loaded["step-000002"][0], initial)
    assert all(not equal_weights(a, b) for a, b in zip(loaded["step-000002"], loaded["final"], strict=True))
    assert all(equal_weights(a, b) for a, b in zip(loaded["step-000004"], loaded["final"], strict=True))
    assert AutoTokenizer.from_pretrained(run / "checkpoints" / "final" / "policy")("1+1=").input_ids == [2, 11, 2, 12]


def load(checkpoint: Path) -> list[dict[str, torch.Tensor]]:
    policy = AutoModelForCausalLM.from_pretrained(checkpoint / "policy")
    return [weights(policy), weights(AutoModelForTokenClassification.from_pretrained(checkpoint / "critic"))]


def test_tensorboard_has_the_numbers_of_metrics_jsonl(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for name in ("objective/scores", "loss/policy_avg", "eval/scores"):
        written = [(row["step"], row[name]) for row in runs.rows(run / "metrics.jsonl") if name in row]
        assert [(e.step, e.value) for e in events.Scalars(name)] == [(s, pytest.approx(v)) for s, v in written]


def test_the_seed_fixes_a_run(run: Path, tmp_path: Path) -> None:
    again = train(whole(tmp_path))
    for a, b in zip(runs.rows(run / "metrics.jsonl"), runs.rows(again / "metrics.jsonl"), strict=True):
        assert {k: v for k, v in a.items() if not k.startswith(("time", "perf"))} == {
            k: v for k, v in b.items() if not k.startswith(("time", "perf"))
        }
    assert (run / "samples.jsonl").read_text() == (again / "samples.jsonl").read_text()


def test_a_folder_that_holds_a_run_is_left_as_it_is(run: Path) -> None:
    """It is found before anything is loaded: the policy of this config does not exist."""
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(
        ValueError, match="already holds a run .*: go on with --resume, give another `out`, or delete the folder"
    ):
        train(runs.config(run.parent, policy={"path": "./nowhere"}))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_run_that_failed_before_its_first_number_is_no_run(tmp_path: Path, capsys: Any) -> None:
    fails = [{"kind": "function", "target": "runs:always_fails"}]
    with pytest.raises(RewardError):
        train(runs.config(tmp_path, rewards=fails))
    assert capsys.readouterr().out.endswith(f"\nfailed {NOTHING_SAVED}")
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert len(iterations(train(runs.config(tmp_path, train={"total_steps": 1})))) == 1


def test_ctrl_c_before_the_first_update_saves_nothing_and_says_so(
    tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PPOEngine, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(runs.config(tmp_path))
    assert capsys.readouterr().out.endswith(f"\ninterrupted {NOTHING_SAVED}")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("logger", ["wandb", "trackio"])
def test_a_logger_that_is_not_installed_is_named_first(logger: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Also beside a folder of its name, as wandb makes one."""
    if importlib.util.find_spec(logger) is not None:
        pytest.skip(f"{logger} is installed")
    (tmp_path / logger).mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    fragment = f"train.loggers asks for '{logger}', which is not installed: pip install 'fastppo[{logger}]'"
    with pytest.raises(ValueError, match=re.escape(fragment)):
        train(runs.config(tmp_path, policy={"path": "./nowhere"}, train={"loggers": [logger]}))


def test_a_failure_in_the_middle_keeps_what_was_trained(tmp_path: Path, capsys: Any) -> None:
    runs.calls.clear()
    rewards = [{"kind": "function", "target": "runs:fails_in_the_third_iteration"}]
    with pytest.raises(RewardError, match="'fails_in_the_third_iteration' raised KeyError: 'no answer'"):
        train(runs.config(tmp_path, rewards=rewards, train={"save_every": 2}))
    folder = tmp_path / "run"
    assert [row["step"] for row in iterations(folder)] == [1, 2] and [r["step"] for r in evaluations(folder)] == [0, 2]
    checkpoints = folder / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["interrupted", "step-000002"]
    kept, step = load(checkpoints / "interrupted"), load(checkpoints / "step-000002")
    assert all(equal_weights(a, b) for a, b in zip(kept, step, strict=True))
    assert f"failed after 2 iterations: saved {checkpoints / 'interrupted'}" in capsys.readouterr().out


def start(path: str, *args: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fastppo", "train", path, *args],
        cwd=Path(__file__).parent,  # where runs.py is
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("number", "ends"), [(signal.SIGINT, (130, "fastppo: interrupted\n")), (signal.SIGTERM, (0, ""))]
)
def test_ctrl_c_or_a_schedulers_signal_ends_a_run_saved(number: signal.Signals, ends: Any, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a child would inherit that it is ignored
    process = start(runs.run_file(tmp_path), "--train.total-steps", "100000")
    signal.signal(signal.SIGINT, before)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.02)
    process.send_signal(number)
    time.sleep(0.01)
    process.send_signal(number)  # as `timeout` and make do: the group has it already
    out, err = process.communicate(timeout=60)
    assert (process.returncode, runs.own(err)) == ends
    assert f"iterations: saved {tmp_path / 'run' / 'checkpoints' / 'interrupted'}" in out
    steps = [row["step"] for row in iterations(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 1
    load(tmp_path / "run" / "checkpoints" / "interrupted")
    assert checkpoint.read(tmp_path / "run" / "checkpoints" / "interrupted").step == steps[-1]


def test_a_second_request_stops_at_once(monkeypatch: Any) -> None:
    clock = iter([10.0, 10.0 + ONE_REQUEST, 10.1 + ONE_REQUEST])
    monkeypatch.setattr("fastppo.stop.time", SimpleNamespace(monotonic=lambda: next(clock)))
    with stop_requests() as received:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)  # SIGINT is ignored in a job of the background
    assert received == [signal.SIGTERM] * 2


def test_of_two_ranks_the_first_writes(tmp_path: Path) -> None:
    """And both train: an iteration counts the sequences of all."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    path = runs.run_file(tmp_path)
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [start(path, "--train.save-every", "2", **world, RANK=str(rank)) for rank in range(2)]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert (
        outputs[1][0] == "" and outputs[0][0].count("\n") == 7
    )  # the plan, whose code runs, three iterations, the end
    folder = tmp_path / "run"
    assert [(row["step"], row["episode"]) for row in iterations(folder)] == [(1, 4), (2, 8), (3, 12)]
    assert [row["step"] for row in evaluations(folder)] == [0, 2, 3]
    assert len(runs.rows(folder / "samples.jsonl")) == 3 * runs.NUM_PROMPTS
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["final", "step-000002"]


@pytest.mark.slow
def test_the_demo_keeps_an_earlier_run(tmp_path: Path) -> None:
    (tmp_path / "ppo").mkdir()
    (tmp_path / "ppo" / "metrics.jsonl").write_text('{"step": 1}\n')
    summary = demo.demo(tmp_path, sizes=demo.Sizes(sft_steps=1, reward_steps=1, ppo_steps=1))
    (old,) = tmp_path.glob("ppo.old-*")
    assert (old / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert len(iterations(tmp_path / "ppo")) == 1 and json.loads((tmp_path / "summary.json").read_text()) == summary
