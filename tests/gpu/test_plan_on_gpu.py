"""Plans against a GPU's own account, and memory that stays where it is."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu
BENCH = Path(__file__).parent.parent.parent / "bench"


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("memory_cases")


@pytest.mark.parametrize("index", [0, 2, 3, 4])
def test_an_update_takes_what_was_planned(index: int, cases: Any, tmp_path: Path) -> None:
    """Within 10 % of max_memory_allocated, beside what was allocated before."""
    from fastppo.memory.plan import make_plan
    from fastppo.memory.setting import setting_of

    case, device = cases.CASES[index], torch.device("cuda")
    run = cases.config(case, tmp_path)
    peaks = cases.measured_on_gpu(run, case)
    for phase in make_plan(setting_of(run, device)).phases:
        if phase.name in peaks:
            assert phase.total == pytest.approx(peaks[phase.name], rel=0.1), (case.name, phase)


@pytest.mark.parametrize("name", ["full, evaluation of 64 prompts", "full, four minibatches, roll-back"])
def test_evaluations_and_roll_backs_take_what_was_planned(name: str, cases: Any, tmp_path: Path) -> None:
    test_an_update_takes_what_was_planned([case.name for case in cases.CASES].index(name), cases, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("uneven", [False, True])
def test_reserved_memory_stays_where_it_is_from_step_50_to_500(uneven: bool, cases: Any, tmp_path: Path) -> None:
    """With micro-batches of other lengths in every step, blocks of the allocator may yet be split once more."""
    case = cases.UNEVEN[0] if uneven else cases.CASES[0]
    run = cases.config(case, tmp_path)
    reserved = cases.reserved_on_gpu(run, case, iterations=500)
    assert max(reserved[49:]) <= reserved[49] * (1.02 if uneven else 1.0), reserved[49::50]
