"""The sweep over launch shapes: what it would time on a GPU is right, and without one it says what it needs."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from numerics import DEVICE

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("tune_rows")


def options(tune: ModuleType, *arguments: str) -> Any:
    small = ["--rows", "8", "--vocab", "600", "--blocks", "256", "--threads-per-program", "32", "--programs", "1", "2"]
    return tune.parser().parse_args([*small, "--stages", "1", "3", "--device", DEVICE, *arguments])


def test_every_shape_fits_a_multiprocessor_and_is_another(tune: ModuleType) -> None:
    for size, vocab in ((2, 128256), (4, 32000)):
        found = list(tune.shapes(vocab, size, 232448, tune.parser().parse_args([])))
        assert len(set(found)) == len(found) > 50
        for shape in found:
            assert shape.lane * size == 16 and shape.reps >= 1 and shape.block <= vocab
            assert shape.threads * shape.programs <= 2048
            assert (shape.stages - 1) * shape.block * size * shape.programs <= 232448
            assert len({tune.name_of(other) for other in found}) == len(found)


def test_what_is_timed_is_held_to_float64_first(tune: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tune.case(options(tune, "--dtype", "float32"), "over", True)
    assert len(made.variants) == 5 and not any(isinstance(x, str) for x in made.variants.values())
    honest = tune.run

    def wrong(p: Any, dlogits: torch.Tensor, shape: Any) -> dict[str, torch.Tensor]:
        outputs = honest(p, dlogits, shape)
        return outputs if shape is None or shape.stages == 1 else {**outputs, "loss": outputs["loss"] + 0.1}

    monkeypatch.setattr(tune, "run", wrong)
    made = tune.case(options(tune, "--dtype", "float32"), "own", False)
    left_out = {name for name, x in made.variants.items() if isinstance(x, str)}
    assert left_out == {"256 x32 s3 p1", "256 x32 s3 p2"}


def test_the_fastest_shape_comes_first_in_the_summary(tune: ModuleType) -> None:
    head = {"op": "rows", "setting": {"dtype": "bfloat16", "gradient": "place", "entropy": False, "R": 1, "V": 2}}
    lines = [{**head, "variant": name, "median_ms": ms} for name, ms in (("a", 2.0), ("b", 1.0))]
    lines.append({**head, "variant": "c", "skipped": "wrong"})
    assert tune.summary(lines).endswith('"median_ms": {"b": 1.0, "a": 2.0}}')


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run([sys.executable, str(BENCH / "tune_rows.py")], capture_output=True, text=True)
    assert done.returncode == 1 and "times the kernels on a CUDA GPU" in done.stderr and "Traceback" not in done.stderr
