"""What was on the disk stays there: killed, without power, with a full disk, told to stop at any moment."""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
from fastppo import PPOEngine, checkpoint, durable, train
from fastppo.demo import make_tokenizer
from fastppo.metrics import JSONLLogger, rewind
from fastppo.resume import LATEST
from test_checkpoint import assert_same_run, config


def written(folder: Path, step: int) -> Path:
    checkpoint.write(folder, lambda path: path.mkdir(parents=True), {"step": step}, {"x": torch.zeros(2)})
    return folder


# --- killed, or without power ----------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nothing is done after it, cleaning up included."""


def kill_at(moment: int, patch: pytest.MonkeyPatch) -> list[str]:
    """Before that rename, or half-way through that deletion; returns what is done of both."""
    done: list[str] = []
    rename, rmtree = Path.rename, shutil.rmtree

    def renamed(self: Path, target: Path) -> Path:
        if len(done) >= moment:
            raise Killed
        done.append(f"rename {self.name}")
        return rename(self, target)

    def deleted(path: Path, *_: Any, **__: Any) -> None:
        if len(done) > moment or not path.exists():
            return
        if len(done) == moment:
            (path / "checksums.json").unlink()
            done.append("killed")
            raise Killed
        done.append(f"rmtree {path.name}")
        rmtree(path)

    patch.setattr(Path, "rename", renamed)
    patch.setattr(shutil, "rmtree", deleted)
    return done


@pytest.mark.parametrize("before", ["interrupted", ".interrupted.old"])
def test_killed_at_any_moment_of_a_write_a_whole_checkpoint_is_there(before: str, tmp_path: Path) -> None:
    """Also where a process that was killed before has left the last one under its other name."""
    killed = 0
    for moment in range(8):
        folder = tmp_path / str(moment)
        written(folder / "checkpoints" / "interrupted", 3).rename(folder / "checkpoints" / before)
        with pytest.MonkeyPatch.context() as patch:
            kill_at(moment, patch)
            try:
                written(folder / "checkpoints" / "interrupted", 4)
            except Killed:
                killed += 1
        for _ in range(2):  # as it is, and after the next process has tidied up
            found, _ = checkpoint.newest(folder / "checkpoints")
            assert found is not None and found.step in (3, 4), moment
            checkpoint.repair(folder / "checkpoints")
        assert {path.name for path in (folder / "checkpoints").iterdir()} == {"interrupted"}
    assert killed >= 2


@contextmanager
def recorded() -> Iterator[list[tuple[str, str, int]]]:
    """(what, path, lines of a log) of every fsync and rename, in order."""
    done: list[tuple[str, str, int]] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def synced(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        done.append(("sync", path, Path(path).read_text().count("\n") if path.endswith(".jsonl") else 0))
        fsync(descriptor)

    def moved(what: Any) -> Any:
        def call(self: Path, target: Path) -> Path:
            done.append(("move", str(target), 0))
            return what(self, target)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", synced)
        patch.setattr(Path, "rename", moved(rename))
        patch.setattr(Path, "replace", moved(replace))
        yield done


def test_nothing_gets_its_name_before_it_is_on_the_disk(tmp_path: Path) -> None:
    """And the name, with those of the folders above it, before anything older is deleted."""
    checkpoints = tmp_path / "run" / "checkpoints"
    with recorded() as done:
        written(checkpoints / "step-000002", 2)
        durable.replace_text(tmp_path / "config.json", "{}")
    calls = [(what, path) for what, path, _ in done]
    moved = calls.index(("move", str(checkpoints / "step-000002")))
    inside = {Path(path).name for what, path in calls[:moved] if what == "sync"}
    assert inside == {"state.json", "state.safetensors", "checksums.json", ".step-000002.partial"}
    above = [path for what, path in calls[moved:] if what == "sync"]
    assert above[:3] == [str(checkpoints), str(checkpoints.parent), str(tmp_path)]
    text = calls[calls.index(("move", str(tmp_path / "config.json"))) - 1 :]
    assert text == [
        ("sync", str(tmp_path / "config.json.partial")),
        ("move", str(tmp_path / "config.json")),
        ("sync", str(tmp_path)),
    ]


def test_a_checkpoint_is_never_ahead_of_its_log(tmp_path: Path) -> None:
    """Without power what was not synced is gone: every iteration behind a checkpoint is in a synced metrics.jsonl."""
    with recorded() as done:
        folder = train(config(tmp_path, train={"eval_every": 9, "save_every": 1}))
    lines, checked = 0, 0
    for what, path, count in done:
        lines = count if path == str(folder / "metrics.jsonl") else lines
        if what == "move" and Path(path).name.startswith("step-"):
            checked += 1
            assert lines >= int(Path(path).name[5:]) + 1  # and one of the first evaluation
    assert checked == 6


def test_a_file_that_could_not_be_replaced_is_as_it_was(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "config.json"
    path.write_text("old")
    whole = Path.write_text

    def half(self: Path, text: str, **options: Any) -> int:
        whole(self, text[: len(text) // 2], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space"):
        durable.replace_text(path, "new one")
    assert path.read_text() == "old"


def test_killed_while_it_goes_back_the_run_goes_on_from_where_it_was_sent(tmp_path: Path, monkeypatch: Any) -> None:
    """--resume DIR of an early checkpoint, killed after it began to change the folder; the scheduler says --resume."""
    undisturbed = train(config(tmp_path))
    folder = tmp_path / "other"
    shutil.copytree(undisturbed, folder)
    other = config(tmp_path, out=str(folder))

    def killed(*args: Any, **options: Any) -> None:
        rewind(*args, **options)
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastppo.run.rewind", killed)
        with pytest.raises(Killed):
            train(other, resume=str(folder / "checkpoints" / "step-000002"))
    assert_same_run(undisturbed, train(other, resume=LATEST))


def test_a_log_that_fails_for_a_moment_has_no_gap_afterwards(tmp_path: Path, monkeypatch: Any) -> None:
    """The iteration whose line was cut is run again."""
    undisturbed = train(config(tmp_path))
    there, whole = config(tmp_path, out=str(tmp_path / "gap")), JSONLLogger.log

    def cut(self: JSONLLogger, metrics: Any, step: int) -> None:
        if step == 4 and "episode" in metrics:
            self.file.write('{"step": 4, "epi')
            self.file.flush()
            raise OSError(28, "No space left on device")
        whole(self, metrics, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JSONLLogger, "log", cut)
        with pytest.raises(OSError, match="No space"):
            train(there)
    assert_same_run(undisturbed, train(there, resume=LATEST))


# --- disks -----------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_when_the_tokenizer_is_written_is_one_sentence_too(tmp_path: Path) -> None:
    """Its library raises a bare Exception."""
    tokenizer: Any = make_tokenizer()
    with pytest.raises(checkpoint.CheckpointError, match="cannot write the checkpoint .*No space left on device"):
        checkpoint.write(tmp_path / "x", lambda path: tokenizer.backend_tokenizer.save("/dev/full"), {"step": 1}, {})
    with pytest.raises(ZeroDivisionError):  # a mistake of ours stays one
        checkpoint.write(tmp_path / "x", lambda path: 1 / 0, {"step": 1}, {})  # pyright: ignore
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_cannot_be_deleted_ends_no_run(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    rmtree = shutil.rmtree

    def busy(path: Path, *rest: Any, **options: Any) -> None:
        if Path(path).name == "step-000001":
            raise OSError(16, "Device or resource busy")
        rmtree(path, *rest, **options)

    for step in (1, 2, 3):
        written(tmp_path / f"step-{step:06d}", step)
    monkeypatch.setattr(shutil, "rmtree", busy)
    checkpoint.prune(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000003"]
    assert "cannot delete the checkpoint" in capsys.readouterr().out


def test_a_run_that_cannot_be_saved_does_not_end_as_if_it_were(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """SIGTERM ends a run with 0 because it is saved."""
    save_file, update = checkpoint.save_file, PPOEngine.update

    def full(tensors: Any, path: Path) -> None:
        if "interrupted" in str(path):
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    def told_to_stop(engine: PPOEngine, experience: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return update(engine, experience)

    monkeypatch.setattr(checkpoint, "save_file", full)
    monkeypatch.setattr(PPOEngine, "update", told_to_stop)
    with pytest.raises(checkpoint.CheckpointError, match="interrupted: .*No space left"):
        train(runs.config(tmp_path))
    assert "interrupted after 1 iterations; could not save interrupted" in capsys.readouterr().out
