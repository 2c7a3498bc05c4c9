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


def test_reserved_memory_stays_where_it_is_after_the_first_iterations(cases: Any, tmp_path: Path) -> None:
    case = cases.CASES[0]
    run = cases.config(case, tmp_path)
    reserved = cases.reserved_on_gpu(run, case, iterations=12)
    assert reserved[4:] == [reserved[4]] * len(reserved[4:])
