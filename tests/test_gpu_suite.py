"""bench/gpu_suite.sh: its budgets, its refusals, that it goes on where it stopped, and a rehearsal of all its parts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "bench" / "gpu_suite.sh"
PARTS = ("tests", "kernels", "step", "determinism", "sanitizer", "memory", "rollout")


def suite(*arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": python, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", str(SCRIPT), *arguments], env=env, capture_output=True, text=True)


def test_the_budgets_of_all_parts_are_under_nine_minutes():
    budgets = dict(re.findall(r"^(?:\w+=1 )?part (\w+) (\d+) ", SCRIPT.read_text(), re.MULTILINE))
    assert tuple(budgets) == PARTS and sum(map(int, budgets.values())) < 9 * 60


def test_an_unknown_option_is_refused():
    done = suite("--fast")
    assert done.returncode == 2 and "usage:" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_runs_here(tmp_path: Path):
    done = suite("--out", str(tmp_path))
    assert done.returncode == 2 and "--rehearse runs the parts on a CPU" in done.stderr


def test_what_is_done_is_not_run_again_and_a_failure_stops_nothing(tmp_path: Path):
    """With an interpreter that fails in one part, and then one that works."""
    broken, works = tmp_path / "broken", tmp_path / "works"
    broken.write_text('#!/bin/sh\ncase "$*" in -c*) echo code ;; *" step "*) exit 3 ;; *) echo ran "$*" ;; esac\n')
    works.write_text('#!/bin/sh\ncase "$*" in -c*) echo code ;; *) echo again "$*" ;; esac\n')
    for file in (broken, works):
        file.chmod(0o755)
    out = tmp_path / "out"
    first = suite("--rehearse", "--out", str(out), python=str(broken))
    assert first.returncode == 1 and "step FAILED" in first.stdout and "=== [" in first.stdout
    done = (out / "suite-rehearsal" / "done").read_text().splitlines()
    assert [line.removeprefix("code ") for line in done] == [part for part in PARTS if part != "step"]
    second = suite("--rehearse", "--out", str(out), python=str(works))
    assert second.returncode == 0 and second.stdout.count("done before") == len(PARTS) - 1
    assert "again -m fastppo bench step" in second.stdout
    printed = (out / "suite-rehearsal" / "log.txt").read_text()
    assert "ran -m fastppo bench kernels" in printed and "again -m fastppo bench step" in printed
    assert len([p for p in out.rglob("*") if p.is_file()]) <= 2, "measurements, what was printed and what is done"


def test_another_commit_runs_all_parts_again(tmp_path: Path):
    works = tmp_path / "works"
    works.write_text('#!/bin/sh\necho ran "$*"\n')
    works.chmod(0o755)
    for commit in ("one", "two"):
        done = suite("--rehearse", "--out", str(tmp_path / "out"), "--commit", commit, python=str(works))
        assert done.returncode == 0 and "done before" not in done.stdout
        assert f"bench kernels --device cpu --quick --threads 1 --go-on --commit {commit}" in done.stdout


def test_every_test_of_tests_gpu_is_run():
    patterns = re.findall(r"tests/gpu/test_\S+", SCRIPT.read_text())
    listed = subprocess.run(["bash", "-c", f"echo {' '.join(patterns)}"], capture_output=True, text=True, check=True)
    assert set(listed.stdout.split()) >= {
        f"tests/gpu/{path.name}" for path in (ROOT / "tests" / "gpu").glob("test_*.py")
    }


@pytest.mark.slow
def test_every_part_runs_at_tiny_sizes(tmp_path: Path):
    done = suite("--rehearse", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "all parts ran" in done.stdout
    for part in ("kernels", "step", "rollout"):
        assert (tmp_path / f"rehearsal-{part}.jsonl").stat().st_size > 0
