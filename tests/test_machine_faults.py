"""What a machine does to a run: a full disk, a folder that turns read-only, SIGKILL, damaged files, memory."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import runs
from fastppo import checkpoint, train
from fastppo.run_file import to_dict
from test_checkpoint import assert_same_run, config

BENCH = Path(__file__).parent.parent / "bench"


@contextmanager
def mounted(where: Path, *arguments: str) -> Iterator[None]:
    """Something mounted at `where`; skips where that takes rights that we have not."""
    where.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", *arguments, str(where)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


def command(path: str, *args: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "fastppo", "train", path, *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(line, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """A real one, of 2 MiB; with room again the run goes on, bit for bit."""
    undisturbed = train(config(tmp_path))
    disk = tmp_path / "disk"
    with mounted(disk, "-t", "tmpfs", "-o", "size=2m", "tmpfs"):
        there = config(tmp_path, out=str(disk / "run"))
        path = tmp_path / "full.json"
        path.write_text(json.dumps(to_dict(there)))
        done = command(str(path))
        assert done.returncode == 1, runs.own(done.stderr)
        assert (
            runs.own(done.stderr).startswith("fastppo: cannot write the checkpoint ")
            and runs.own(done.stderr).count("\n") == 1
        )
        assert "No space left on device" in runs.own(done.stderr) and "go on with --resume" in runs.own(done.stderr)
        found, passed_over = checkpoint.newest(disk / "run" / "checkpoints")
        assert found is not None and found.step >= 2 and passed_over == []
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert command(str(path), "--resume").returncode == 0
        assert_same_run(undisturbed, disk / "run")


@pytest.mark.slow
def test_a_log_that_cannot_be_written_is_one_line_too(tmp_path: Path) -> None:
    """The disk is full before the first checkpoint: metrics.jsonl is what fails."""
    disk = tmp_path / "disk"
    with mounted(disk, "-t", "tmpfs", "-o", "size=64k", "tmpfs"):
        (disk / "filler").write_bytes(b"x" * 44 * 1024)
        done = command(runs.run_file(tmp_path, out=str(disk / "run"), train={"total_steps": 500, "eval_every": 1}))
    assert done.returncode == 1 and "Traceback" not in runs.own(done.stderr), runs.own(done.stderr)
    assert runs.own(done.stderr).count("\n") == 1 and "No space left on device" in runs.own(done.stderr)


@pytest.mark.slow
def test_a_run_folder_that_is_read_only_is_refused_at_once(tmp_path: Path) -> None:
    """By a read-only mount: to root any other folder is open."""
    place = tmp_path / "place"
    with mounted(place, "--bind", str(tmp_path)):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(place)], check=True)
        done = command(runs.run_file(tmp_path, out=str(place / "run")))
    assert done.returncode == 2 and runs.own(done.stderr).count("\n") == 1
    assert runs.own(done.stderr).startswith(
        "fastppo: cannot write to the run folder"
    ) and "Read-only file system" in runs.own(done.stderr)


@pytest.mark.slow
def test_a_folder_that_can_no_longer_be_written_ends_the_run_in_one_line(tmp_path: Path) -> None:
    """The folder of checkpoints is made immutable, which holds root too."""
    path = runs.run_file(tmp_path, train={"total_steps": 10**6, "save_every": 2, "eval_every": 10**6})
    checkpoints = tmp_path / "run" / "checkpoints"
    process = subprocess.Popen(
        [sys.executable, "-m", "fastppo", "train", path],
        cwd=Path(__file__).parent, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        while process.poll() is None and not list(checkpoints.glob("step-000004")):
            time.sleep(0.02)
        if subprocess.run(["chattr", "+i", str(checkpoints)], capture_output=True).returncode:
            pytest.skip("cannot make a folder immutable here")
        _, err = process.communicate(timeout=60)
    finally:
        subprocess.run(["chattr", "-i", str(checkpoints)], capture_output=True)
        process.kill()
        process.communicate()
    err = runs.own(err)
    assert process.returncode == 1 and "Traceback" not in err and err.count("\n") == 1, err
    assert err.startswith("fastppo: cannot write the checkpoint") and "Operation not permitted" in err
    found, passed_over = checkpoint.newest(checkpoints)
    assert found is not None and found.step >= 4 and passed_over == []


def script(name: str, *args: str, ends: int = 0) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, str(BENCH / name), *args]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == ends, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_killed_at_three_random_moments_the_run_ends_as_if_nothing_had_happened() -> None:
    assert "are the same, bit for bit" in script("kill_resume.py", "--kills", "3", "--seed", "7")


@pytest.mark.slow
def test_mutated_run_files_and_damaged_checkpoints_are_said_in_one_line() -> None:
    said = script("fuzz_inputs.py", "--configs", "100", "--checkpoints", "30", "--seed", "7")
    assert sum(int(line.split()[0]) for line in said.splitlines()) == 130


@pytest.mark.slow
def test_memory_and_open_files_of_three_hundred_iterations_do_not_grow() -> None:
    script("flat_memory.py", "--steps", "300")


@pytest.mark.slow
def test_a_leak_of_128_kib_per_iteration_is_seen() -> None:
    assert "growth after iteration 50: +" in script("flat_memory.py", "--steps", "100", "--leak-kib", "128", ends=1)


def test_ctrl_c_while_the_command_is_imported_is_quiet() -> None:
    """Before torch is there; nothing was begun, so nothing is saved."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a child would inherit that it is ignored
    slow = "import sys, time, builtins\n"
    slow += "class Slow:\n    def find_spec(self, name, path=None, target=None):\n"
    slow += "        if name == 'torch':\n            print('importing', flush=True)\n            time.sleep(60)\n"
    slow += "sys.meta_path.insert(0, Slow())\nfrom fastppo.__main__ import main\nmain()\n"
    process = subprocess.Popen([sys.executable, "-c", slow], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    assert process.stdout is not None and process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "fastppo: interrupted\n")
