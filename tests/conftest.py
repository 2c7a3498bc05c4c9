"""What holds in every test: no network, the same random numbers, and NaN in all memory nobody has written."""

import importlib
import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

HAS_GPU = torch.cuda.is_available()

# Read by the libraries when they are first imported (torch._dynamo imports Triton), so set before any of them is.
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # every Triton kernel runs on the CPU, in Triton's interpreter

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch._dynamo  # noqa: E402  while torch.empty is still its own: torch.compile looks functions up by identity

with torch.device("meta"):
    torch.empty(0)  # and so does `torch.device`, when it is first used as a context

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    def _fma(_: object, x: interpreter.TensorHandle, y: interpreter.TensorHandle, z: interpreter.TensorHandle):
        """Rounds once, as on every GPU; the interpreter of Triton 3.7 rounds twice."""
        product = np.multiply(x.data, y.data, dtype=np.float64)
        return interpreter.TensorHandle((product + z.data).astype(z.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = _fma  # pyright: ignore[reportAttributeAccessIssue]

with suppress(ImportError):  # tests/gpu runs without hypothesis too
    import hypothesis

    # The interpreter's first call is slow and a failure must repeat: no deadline, the same examples every run.
    hypothesis.settings.register_profile("fastppo", deadline=None, derandomize=True)
    hypothesis.settings.load_profile("fastppo")

POISONED_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests, and say so, on a machine without one."""
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a GPU; torch.cuda.is_available() is False here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Same random numbers every run, whatever ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are ten times slower on two threads of a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh floating-point memory is NaN, so an output that a kernel leaves unwritten cannot pass for a right one."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poison(getattr(owner, name)))


def _poison(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_nan(*args, **kwargs) -> torch.Tensor:
        fresh = allocate(*args, **kwargs)
        # A subclass is a tracer's stand-in (fake, functional): it has no memory, and a fill would end up in its graph.
        if type(fresh) is torch.Tensor and fresh.dtype in POISONED_DTYPES and fresh.layout is torch.strided:
            with torch.no_grad():  # a leaf that requires grad may be filled too
                fresh.fill_(float("nan"))
        return fresh

    return allocate_nan


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> Any:
    """bench/memory_cases.py."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    return importlib.import_module("memory_cases")
