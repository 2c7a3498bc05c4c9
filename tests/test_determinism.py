"""deterministic = true: the same bits every time, resumed or not; what is put up is taken down again."""

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import runs
from fastppo import attention, train
from fastppo.determinism import WORKSPACE, deterministic
from fastppo.resume import LATEST
from test_checkpoint import assert_same_run, config


def flags() -> list[Any]:
    cudnn: Any = torch.backends.cudnn
    fill: Any = torch.utils.deterministic
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return [
        *algorithms,
        cudnn.deterministic,
        cudnn.benchmark,
        fill.fill_uninitialized_memory,
        os.environ.get(WORKSPACE),
    ]


@pytest.mark.parametrize("name", ["adaptive", "bfloat16"])
def test_a_deterministic_run_is_itself_resumed_or_not(name: str, tmp_path: Path) -> None:
    one, two = (train(config(tmp_path, name, deterministic=True, out=str(tmp_path / x))) for x in "ab")
    assert_same_run(one, two)
    for path in (two / "checkpoints").iterdir():
        if path.name != "step-000004":
            shutil.rmtree(path)
    assert_same_run(one, train(config(tmp_path, name, deterministic=True, out=str(two)), resume=LATEST))


@pytest.mark.slow
def test_which_of_two_threads_computes_a_piece_changes_no_bit(tmp_path: Path) -> None:
    threads, short = torch.get_num_threads(), {"total_steps": 2}
    torch.set_num_threads(2)
    try:
        one, two = (train(config(tmp_path, train=short, deterministic=True, out=str(tmp_path / x))) for x in "ab")
    finally:
        torch.set_num_threads(threads)
    assert_same_run(one, two)


def test_an_operation_that_is_not_deterministic_is_refused_and_the_flags_are_put_back(tmp_path: Path) -> None:
    before, seen = flags(), []

    def inside(samples: Any) -> list[float]:
        seen.append(flags())
        return [0.0] * len(samples)

    runs_inside: Any = inside
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "digits", runs_inside)
        train(runs.config(tmp_path, deterministic=True, train={"total_steps": 1}))
    assert seen[0] == [True, False, True, False, False, before[-1] or ":4096:8"] and flags() == before
    with pytest.raises(ZeroDivisionError), deterministic(True):
        raise ZeroDivisionError
    assert flags() == before


def test_a_workspace_that_is_not_deterministic_is_refused(monkeypatch: Any) -> None:
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with pytest.raises(ValueError, match="deterministic = true needs CUBLAS_WORKSPACE_CONFIG to be one of"):
        deterministic(True).__enter__()
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_the_flash_attn_package_is_told(monkeypatch: Any) -> None:
    """Its backward adds up in any order unless asked; it does not look at PyTorch's switch."""
    told: list[bool] = []

    def flash_attn_varlen_func(q: Any, *_: Any, deterministic: bool = False, **__: Any) -> Any:
        told.append(deterministic)
        return q

    package = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    x = torch.zeros(5, 2, 4)
    for wanted in (False, True):
        with deterministic(wanted):
            attention._flash_attn(x, x, x, attention.plan([2, 3]), None, None, None)
    assert told == [False, True]
