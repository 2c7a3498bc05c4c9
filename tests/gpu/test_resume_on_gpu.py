"""deterministic = true on a GPU: the same bits every time, resumed or not."""

import shutil
from pathlib import Path

import pytest

import runs
from test_checkpoint import assert_same_run, back_to
from test_machine_faults import command

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_deterministic_run_on_a_gpu_is_itself_resumed_or_not(dtype: str, tmp_path: Path) -> None:
    """In processes of their own: cuBLAS is told before CUDA is first used."""
    policy = {"path": runs.checkpoint(tmp_path / "policy"), "dtype": dtype}
    path = runs.run_file(
        tmp_path, device="cuda", deterministic=True, policy=policy, train={"total_steps": 4, "save_every": 2}
    )
    one, two, resumed = (tmp_path / name for name in ("one", "two", "resumed"))
    for out in (one, two):
        done = command(path, "--out", str(out))
        assert done.returncode == 0, done.stderr
    assert_same_run(one, two)
    shutil.copytree(two, resumed)
    back_to(resumed, 2)
    done = command(path, "--out", str(resumed), "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_run(one, resumed)
