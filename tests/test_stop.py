"""Told to stop, sent back, spread over ranks: a run is saved, says so, and goes on where it should."""

import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

import runs
from fastppo import PPOEngine, checkpoint, train
from fastppo.resume import refuse_another_run
from fastppo.run_file import to_dict
from fastppo.stop import stop_requests
from test_checkpoint import assert_same_run
from test_faults import Poisoned
from test_trainer import start

# --- signals ---------------------------------------------------------------------------------------------------------


def test_a_signal_while_the_run_is_saved_waits_for_it(tmp_path: Path, monkeypatch: Any) -> None:
    """Schedulers and torchrun send it more than once."""
    outside: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: outside.append(number))
    write, update = checkpoint.write, PPOEngine.update

    def again(folder: Path, *args: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        write(folder, *args)

    def told_to_stop(engine: PPOEngine, experience: Any) -> Any:
        if engine.version == 1:
            signal.raise_signal(signal.SIGTERM)
        return update(engine, experience)

    monkeypatch.setattr(checkpoint, "write", again)
    monkeypatch.setattr(PPOEngine, "update", told_to_stop)
    try:
        with pytest.raises(SystemExit) as ended:
            train(runs.config(tmp_path, train={"keep_rollouts": False, "eval_every": 9}))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (ended.value.code, outside) == (0, [])
    assert checkpoint.read(tmp_path / "run" / "checkpoints" / "interrupted").step == 2


def test_a_request_to_stop_is_one_where_nobody_reads_the_output_any_more() -> None:
    """`fastppo train RUN.toml | tee log`: Ctrl-C ends tee at once."""
    reads, writes = os.pipe()
    os.close(reads)
    stdout = os.dup(1)
    os.dup2(writes, 1)
    try:
        with stop_requests() as received:
            signal.raise_signal(signal.SIGTERM)
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(writes)
    assert received == [signal.SIGTERM]


# --- ranks -----------------------------------------------------------------------------------------------------------


def on_two_ranks(path: str, *args: str, **environment: str) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment}
    ranks = [start(path, *args, **world, RANK=str(rank)) for rank in range(2)]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    return [(rank.returncode, out, runs.own(err)) for rank, (out, err) in zip(ranks, outputs, strict=True)]


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[tuple[int, str, str]]]:
    """A run of two ranks in whose third iteration the reward of the second one fails."""
    rewards = [{"kind": "function", "target": "runs:fails_on_the_second_rank", "name": "judge"}]
    path = runs.run_file(tmp_path_factory.mktemp("ranks"), rewards=rewards, train={"total_steps": 5, "save_every": 9})
    return path, on_two_ranks(path, REWARD_FAILS="1")


@pytest.mark.slow
def test_what_fails_on_one_rank_is_said_by_all_and_saved(failed: tuple[str, list[tuple[int, str, str]]]) -> None:
    """Else the first one would wait for the others in the next sum, on GPUs until it is killed."""
    path, ((code, out, err), (other_code, other_out, other_err)) = failed
    folder = Path(path).parent / "run"
    assert (code, other_code, other_out) == (1, 1, "")
    assert other_err.startswith("fastppo: reward 'judge' raised KeyError: 'no answer'") and other_err.count("\n") == 1
    assert err == "fastppo: rank 1: RewardError: " + other_err.removeprefix("fastppo: ")
    assert "failed after 2 iterations: saved" in out
    assert checkpoint.read(folder / "checkpoints" / "interrupted").step == 2
    kept = [checkpoint.read(folder / "rollouts" / f"rank-{rank}").numbers for rank in range(2)]
    assert [numbers["scores"] is None for numbers in kept] == [False, True] and kept[0]["follows"] == kept[1]["follows"]


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_bit_for_bit(failed: tuple[str, list[tuple[int, str, str]]], tmp_path: Path) -> None:
    """Every rank with its own generators and its own finished rollout."""
    path, _ = failed
    undisturbed = on_two_ranks(path, "--out", str(tmp_path / "undisturbed"))
    resumed = on_two_ranks(path, "--resume")
    assert [code for code, *_ in (*undisturbed, *resumed)] == [0] * 4
    assert "took the rollout and scores of iteration 3 that was finished" in resumed[0][1]
    assert_same_run(tmp_path / "undisturbed", Path(path).parent / "run")


# --- what a run goes on from -----------------------------------------------------------------------------------------


def test_a_roll_back_takes_nothing_of_a_future_that_was_abandoned(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Sent back to iteration 2, the run has checkpoints up to 6 beside it, and the worst of them is the newest."""
    ppo = {"num_epochs": 1, "num_minibatches": 1, "max_skipped_steps": 2, "on_max_skipped": "roll_back"}
    there = runs.config(tmp_path, ppo=ppo, train={"total_steps": 6, "eval_every": 9, "save_every": 1, "keep_last": 0})
    folder = train(there)
    Poisoned(monkeypatch, 4, 2)
    train(there, resume=str(folder / "checkpoints" / "step-000002"))
    assert "are those of" in (said := capsys.readouterr().out) and "checkpoints/step-000003 again" in said


def test_a_key_that_a_later_version_has_added_changes_nothing_by_its_default(tmp_path: Path) -> None:
    before = json.loads(json.dumps(to_dict(runs.config(tmp_path))))
    del before["ppo"]["clip_low"], before["rewards"][0]["weight"], before["watch"]
    assert refuse_another_run(before, runs.config(tmp_path), "x") == []
    with pytest.raises(ValueError, match=r"x is of another run: ppo.clip_low was None, is 0.1\."):
        refuse_another_run(before, runs.config(tmp_path, ppo={"clip_low": 0.1}), "x")
    with pytest.raises(ValueError, match="rewards.1.kind was None, is 'function'"):
        two = [{"kind": "function", "target": "runs:digits"}, {"kind": "function", "target": "runs:noisy"}]
        refuse_another_run(before, runs.config(tmp_path, rewards=two), "x")
