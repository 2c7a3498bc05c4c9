"""Laws of the C++ row kernels, for every instruction set that this CPU has."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastppo_kernels import reference
from fastppo_kernels.native import isa as isas
from fastppo_kernels.native import rows as native
from fastppo_kernels.native.library import library_path
from fastppo_kernels.reference import PPORows
from fastppo_kernels.settings import HeadSettings, PPOSettings
from native_rows import DTYPES, HEADS, PLAIN, check_logprobs, isa, problem, strided

__all__ = ["isa"]  # a fixture


@pytest.mark.parametrize("head", HEADS, ids=["plain", "temperature", "softcap"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("R", "V"), [(0, 7), (1, 1), (3, 1), (3, 5), (63, 127), (1, 8192), (3, 20011)])
def test_values_and_gradients_are_those_of_float64(isa: str, R: int, V: int, dtype: torch.dtype, head: HeadSettings):
    for out in DTYPES:
        check_logprobs(*problem(R, V, dtype), head, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_real_vocabulary(isa: str, dtype: torch.dtype):
    check_logprobs(*problem(3, 32000, dtype), HEADS[1], dtype)


LARGE = [(257, 32000), (63, 50257), (257, 128256), (63, 151936)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("R", "V"),
    [(0, 151936), (1, 50257), (3, 128256), (257, 1), (257, 5), (257, 127)]
    + [pytest.param(*shape, marks=pytest.mark.slow) for shape in LARGE],
)
def test_the_shapes_of_real_models(R: int, V: int, dtype: torch.dtype):
    check_logprobs(*problem(R, V, dtype), HEADS[1], dtype)


@pytest.mark.parametrize("V", list(range(1, 140)))
def test_every_length_of_the_last_vector(V: int):
    """Nothing is read or written behind the row, nothing before it is forgotten; every lane once, on all at a time."""
    for name, number in isas.available_isas().items():
        for dtype in DTYPES:
            logits, targets = problem(2, V, dtype)
            batch = native._batch(logits, targets, PLAIN, entropy=False, dlogits=None)
            assert batch.isa in isas.available_isas().values()
            logprobs = torch.empty(2)
            batch.isa = number
            assert native.load().fastppo_logprob_rows(native.byref(batch), logprobs.data_ptr(), None) == -1
            truth = logits.double().log_softmax(1).gather(1, targets[:, None]).squeeze(1)
            assert (logprobs - truth).abs().max() <= 4e-6, (name, dtype)
            dlogits = strided(torch.zeros_like(logits), 70)
            behind = dlogits.as_strided((2, 70), (V + 70, 1), V)
            batch.dlogits, batch.dlogits_stride, batch.dlogits_dtype = dlogits.data_ptr(), V + 70, batch.logits_dtype
            ones = torch.ones(2)
            assert native.load().fastppo_logprob_rows_backward(native.byref(batch), ones.data_ptr(), None) == -1
            assert dlogits.double().sum(1).abs().max() < (1e-5 if dtype == torch.float32 else 2e-2), (name, dtype)
            assert behind.isnan().all(), (name, dtype)


@pytest.mark.parametrize("scale", [0.1, 3.0, 20.0])
def test_log_prob_error_at_a_large_vocabulary(isa: str, scale: float):
    """5e-6 at V = 128256, flat or peaked."""
    logits, targets = problem(2, 128256, scale=scale)
    logprobs, entropy = native.logprob_rows(logits, targets, PLAIN, entropy=True)
    truth, true_entropy = reference.logits_token_logprobs(logits.double(), targets, PLAIN)
    assert entropy is not None and true_entropy is not None
    assert (logprobs - truth).abs().max() <= 5e-6
    assert (entropy - true_entropy).abs().max() <= 5e-6


@pytest.mark.parametrize("offset", [150.0, -150.0, 1e4, -1e4])
@pytest.mark.parametrize("head", HEADS[:2], ids=["plain", "temperature"])
def test_a_common_offset_costs_no_accuracy(isa: str, offset: float, head: HeadSettings):
    for dtype in DTYPES:
        logits, targets = problem(4, 9001, dtype)
        check_logprobs(logits.add_(offset), targets, head, torch.float32)
        logprobs, _ = native.logprob_rows(logits, targets, head, entropy=False)
        truth, _ = reference.logits_token_logprobs(logits.double(), targets, head, entropy=False)
        assert (logprobs - truth).abs().max() <= 5e-6


@pytest.mark.parametrize("head", HEADS[:2], ids=["plain", "temperature"])
def test_a_masked_vocabulary_gets_no_gradient_and_makes_no_nan(isa: str, head: HeadSettings):
    """-inf in single columns, in whole blocks from the front, and everywhere but at the target."""
    for dtype in DTYPES:
        logits, targets = problem(3, 20011, dtype)
        masked = torch.rand(3, 20011) < 0.3
        masked[1, :18000] = True
        masked[2] = True
        masked.scatter_(1, targets[:, None], False)
        logits[masked] = -math.inf
        check_logprobs(logits, targets, head, dtype)
        dlogits = torch.empty_like(logits)
        native.logprob_rows_backward(logits, targets, torch.ones(3), torch.ones(3), head, dlogits=dlogits)
        assert dlogits[masked].eq(0).all() and dlogits.isfinite().all()


def test_logits_too_far_below_to_matter_are_zero_not_noise(isa: str):
    """2^-n runs out at n = 126; the neighbourhood of that point, and far beyond it."""
    gaps = torch.cat([torch.linspace(80, 110, 301), torch.tensor([1e3, 1e4, 1e30, 3e38])])
    logits = torch.cat([torch.zeros(1), -gaps])[None]
    check_logprobs(logits, torch.tensor([0]), PLAIN, torch.float32, atol=1e-30)
    dlogits = torch.empty_like(logits)
    native.logprob_rows_backward(logits, torch.tensor([0]), torch.ones(1), None, PLAIN, dlogits=dlogits)
    truth = -(-gaps.double()).exp()
    assert (dlogits[0, 1:] - truth).abs().max() <= 2.0**-126
    near = gaps < 86
    assert ((dlogits[0, 1:] / truth)[near] - 1).abs().max() < 5e-6


def test_extreme_logits_under_a_softcap_are_its_bounds(isa: str):
    logits = torch.tensor([[-math.inf, math.inf, 0.0, 1e30, -1e30, 1e-20, -1e-20, 0.5, -0.5]])
    check_logprobs(logits.nan_to_num(), torch.tensor([7]), HeadSettings(softcap=2.0), torch.float32)
    logprobs, _ = native.logprob_rows(logits, torch.tensor([0]), HeadSettings(softcap=2.0), entropy=False)
    finite, _ = native.logprob_rows(logits.nan_to_num(), torch.tensor([0]), HeadSettings(softcap=2.0), entropy=False)
    assert torch.equal(logprobs, finite)


@pytest.mark.parametrize("place", [0, 5, 4097, 9000])
def test_a_nan_is_never_hidden(isa: str, place: int):
    """Also where a vector maximum drops it, and behind a block of -inf; its neighbours do not see it."""
    for dtype in DTYPES:
        for bad in (math.nan, math.inf):
            logits, targets = problem(3, 9001, dtype)
            clean = native.logprob_rows(logits, targets, PLAIN, entropy=False)[0]
            logits[1, place] = bad
            logits[1, : min(place, 9)] = -math.inf
            logprobs, entropy = native.logprob_rows(logits, targets, PLAIN, entropy=True)
            assert entropy is not None and logprobs[1].isnan() and entropy[1].isnan()
            assert torch.equal(logprobs[::2], clean[::2])
            for head in HEADS[:2]:
                dlogits = torch.zeros_like(logits)
                native.logprob_rows_backward(logits, targets, torch.ones(3), torch.ones(3), head, dlogits=dlogits)
                assert dlogits[1].isnan().all() and dlogits[::2].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_than_2_to_the_31_elements(isa: str, dtype: torch.dtype):
    """Rows that lie 2^30 + 7 elements apart, in memory that exists only where it is touched."""
    V, step = 37, (1 << 30) + 7
    width = {torch.float32: np.int32, torch.bfloat16: np.int16}[dtype]
    memory = torch.from_numpy(np.zeros(2 * step + V, dtype=width)).view(dtype)
    near, targets = problem(3, V, dtype)
    far = memory.as_strided((3, V), (step, 1))
    far.copy_(near)
    rows, apart = PPORows(None, torch.randn(3), torch.rand(3) + 0.1), torch.zeros_like(near)
    expected = native.ppo_rows(near, targets, rows, PPOSettings(), PLAIN, entropy=False, dlogits=apart)
    table = native.ppo_rows(far, targets, rows, PPOSettings(), PLAIN, entropy=False, dlogits=far)
    assert torch.equal(table, expected) and torch.equal(far, apart)


def test_a_target_outside_the_vocabulary_is_named_and_nothing_is_written(isa: str):
    logits, targets = problem(4, 11)
    before, rows = logits.clone(), PPORows(None, torch.ones(4), torch.tensor([1.0, 0.0, 1.0, 1.0]))
    targets[1], targets[2] = 999, -1
    with pytest.raises(ValueError, match=r"targets\[2\] = -1 must lie in \[0, V\) = \[0, 11\)"):
        native.ppo_rows(logits, targets, rows, PPOSettings(), PLAIN, entropy=False, dlogits=logits)
    with pytest.raises(ValueError, match=r"targets\[1\] = 999"):
        native.logprob_rows(logits, targets, PLAIN, entropy=False)
    with pytest.raises(ValueError, match=r"targets\[1\] = 999"):
        native.logprob_rows_backward(logits, targets, torch.ones(4), None, PLAIN, dlogits=logits)
    assert torch.equal(logits, before)


def test_tensors_the_kernels_cannot_take_are_refused():
    logits, targets = torch.randn(4, 6), torch.zeros(4, dtype=torch.int64)
    ones = torch.ones(4)

    def backward(z: Tensor, dlogits: Tensor) -> None:
        native.logprob_rows_backward(z, targets, ones, None, PLAIN, dlogits=dlogits)

    for bad in (logits.half(), logits.double(), torch.randn(6, 4).T):
        with pytest.raises(ValueError, match="logits must be"):
            native.logprob_rows(bad, targets, PLAIN, entropy=False)
        with pytest.raises(ValueError, match="dlogits must be"):
            backward(logits, bad)
    flat = torch.randn(64)
    narrow, wide = flat.view(torch.bfloat16).as_strided((4, 6), (12, 1)), flat.as_strided((4, 6), (6, 1))
    for z, dlogits in (
        (flat.as_strided((4, 6), (6, 1), 2), wide),
        (wide, narrow.as_strided((4, 6), (6, 1))),
        (narrow, wide),
    ):
        with pytest.raises(ValueError, match="overlaps logits"):
            backward(z, dlogits)
    with pytest.raises(ValueError, match="rows of dlogits overlap"):
        backward(logits, torch.zeros(6).expand(4, 6))
    backward(wide, narrow)
    for bad_targets in (targets.int(), targets[:3], targets[:, None]):
        with pytest.raises(ValueError, match=r"targets \(R,\) int64, got"):
            native.logprob_rows(logits, bad_targets, PLAIN, entropy=False)
    with pytest.raises(ValueError, match="logits must be .* with V >= 1"):
        native.logprob_rows(logits[:, :0], targets, PLAIN, entropy=False)
    rows, bonus = PPORows(None, ones, ones), PPOSettings(entropy_coef=0.1)
    with pytest.raises(ValueError, match=r"entropy_coef = 0.1 needs the entropy of every row; pass entropy=True"):
        native.ppo_rows(logits, targets, rows, bonus, PLAIN, entropy=False, dlogits=None)


# Without torch there is no OpenMP runtime in the process, and with no address space left no thread can be had.
ALONE = """
import ctypes, resource, sys
library, N = ctypes.CDLL(sys.argv[1]), 1 << 20
values, blocks, out = (ctypes.c_float * N)(*([1.0] * N)), (ctypes.c_double * (3 * N // 1024))(), (ctypes.c_double * 3)()
if sys.argv[2] == "no threads":
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), used + (1 << 20)))
library.fastppo_moments(ctypes.c_int64(N), values, None, blocks, out, library.fastppo_num_isas() - 1, 4)
print(*out)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the size of the process as Linux tells it")
@pytest.mark.parametrize("threads", ["threads", "no threads"])
def test_a_thread_that_cannot_be_had_is_no_crash(threads: str):
    """Nothing is thrown through the C ABI, where it would end the process."""
    command = [sys.executable, "-c", ALONE, str(library_path()), threads]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["1048576.0", "1.0", "0.0"]), done.stderr


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(isas.ISA_VARIABLE, "mmx")
    with pytest.raises(
        ValueError, match="FASTPPO_ISA = 'mmx' is no instruction set of this CPU and build; available: "
    ):
        native.logprob_rows(*problem(1, 5), PLAIN, entropy=False)
    monkeypatch.delenv(isas.ISA_VARIABLE)
    assert isas.chosen_isa() == next(iter(isas.available_isas().values()))
    assert list(isas.available_isas())[-1] == "portable"
