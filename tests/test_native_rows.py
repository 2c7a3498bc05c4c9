"""Laws of the C++ row kernels, for every instruction set that this CPU has."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastppo_kernels import reference
from fastppo_kernels.native import rows as native
from fastppo_kernels.reference import PPORows
from fastppo_kernels.settings import KL_ESTIMATORS, HeadSettings, PPOSettings
from fastppo_kernels.table import PPO_COLUMNS, ppo_table
from numerics import assert_as_accurate, guarded

PLAIN = HeadSettings()
HEADS = (PLAIN, HeadSettings(temperature=0.6), HeadSettings(temperature=0.8, softcap=30.0))
DTYPES = (torch.float32, torch.bfloat16)
COLUMN = {name: i for i, name in enumerate(PPO_COLUMNS)}


@pytest.fixture(params=native.available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(native.ISA_VARIABLE, request.param)
    return request.param


def strided(x: Tensor, extra: int) -> Tensor:
    """Copy of (R, V) `x` whose rows lie V + extra apart, NaN between and behind them."""
    wide = torch.full((x.shape[0], x.shape[1] + extra), math.nan, dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    return guarded(wide)[:, : x.shape[1]]


def problem(R: int, V: int, dtype: torch.dtype = torch.float32, *, scale: float = 4.0) -> tuple[Tensor, Tensor]:
    return strided((scale * torch.randn(R, V)).to(dtype), 3), torch.randint(V, (R,))


def ppo_constants(logprobs: Tensor, *, dead: float = 0.2) -> PPORows:
    """Ratios on both sides of every clip and far beyond, advantages of both signs, some dead rows full of NaN."""
    R = logprobs.shape[0]
    alive = torch.rand(R) >= dead

    def number(x: Tensor) -> Tensor:
        return torch.where(alive, x.float(), math.nan)

    spread = torch.tensor([0.1, 0.5, 2.0, 25.0])[torch.randint(4, (R,))]
    return PPORows(
        number(logprobs + spread * torch.randn(R)),
        number(torch.randn(R)),
        torch.where(alive, torch.rand(R) + 0.1, 0.0),
        number(logprobs + torch.randn(R)),
        number(2 * torch.rand(R)),
        number(logprobs + 0.01 * torch.randn(R)),
    )


def plain_logprobs(logits: Tensor, targets: Tensor, head: HeadSettings, grads: tuple[Tensor, Tensor]) -> list[Tensor]:
    """[logprobs, entropy, dlogits] of the reference in the dtype of the logits."""
    z = logits.clone().requires_grad_()
    logprobs, entropy = reference.logits_token_logprobs(z, targets, head)
    assert entropy is not None
    loss = (logprobs * grads[0].to(logprobs)).sum() + (entropy * grads[1].to(entropy)).sum()
    return [logprobs.detach(), entropy.detach(), *torch.autograd.grad(loss, z)]


def check_logprobs(
    logits: Tensor, targets: Tensor, head: HeadSettings, out: torch.dtype, *, atol: float = 5e-7
) -> None:
    """`atol`: nats by which log-probs and entropies may be off even where plain PyTorch is right by luck."""
    R = logits.shape[0]
    grads = (torch.randn(R), torch.randn(R))
    logprobs, entropy = native.logprob_rows(logits, targets, head, entropy=True)
    assert entropy is not None
    dlogits = strided(torch.zeros_like(logits, dtype=out), 5)
    native.logprob_rows_backward(logits, targets, *grads, head, dlogits=dlogits)
    baseline = plain_logprobs(logits.float(), targets, head, grads)
    truth = plain_logprobs(logits.double(), targets, head, grads)
    baseline[2] = baseline[2].to(out)
    for name, a, b, t in zip(
        ("logprobs", "entropy", "dlogits"), (logprobs, entropy, dlogits), baseline, truth, strict=True
    ):
        assert_as_accurate(name, a, b, t, atol=1e-30 if name == "dlogits" else atol)


@pytest.mark.parametrize("head", HEADS, ids=["plain", "temperature", "softcap"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("R", "V"), [(0, 7), (1, 1), (3, 1), (3, 5), (63, 127), (1, 8192), (3, 20011)])
def test_values_and_gradients_are_those_of_float64(isa: str, R: int, V: int, dtype: torch.dtype, head: HeadSettings):
    for out in DTYPES:
        check_logprobs(*problem(R, V, dtype), head, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_real_vocabulary(isa: str, dtype: torch.dtype):
    check_logprobs(*problem(3, 32000, dtype), HEADS[1], dtype)


@pytest.mark.parametrize("V", list(range(1, 140)))
def test_every_length_of_the_last_vector(V: int):
    """Nothing is read or written behind the row, nothing before it is forgotten; every lane once, on all at a time."""
    for name, number in native.available_isas().items():
        for dtype in DTYPES:
            logits, targets = problem(2, V, dtype)
            batch = native._batch(logits, targets, PLAIN, entropy=False, dlogits=None)
            assert batch.isa in native.available_isas().values()
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


SETTINGS = st.fixed_dictionaries(
    {
        "clip_low": st.sampled_from([0.2, 0.0, math.inf]),
        "clip_high": st.sampled_from([0.2, 0.28, math.inf]),
        "dual_clip": st.sampled_from([None, 1.5, 3.0]),
        "kl_coef": st.sampled_from([0.0, 0.3]),
        "kl_estimator": st.sampled_from(KL_ESTIMATORS),
        "entropy_coef": st.sampled_from([0.0, 0.1, -0.1]),
        "old_kl_coef": st.sampled_from([0.0, 0.2]),
    }
)
LEFT_OUT = st.sets(st.sampled_from(["old_logprobs", "ref_logprobs", "is_weights", "sampler_logprobs"]))


def plain_ppo(logits: Tensor, targets: Tensor, rows: PPORows, s: PPOSettings, head: HeadSettings) -> list[Tensor]:
    """[table, dlogits] of the reference in the dtype of the logits."""
    live = rows.weights != 0
    z = torch.where(live[:, None], logits, 0).requires_grad_()
    logprobs, entropy = reference.logits_token_logprobs(z, torch.where(live, targets, 0), head)
    loss, _ = reference.ppo_loss(logprobs, rows, s, entropy)
    return [ppo_table(logprobs, entropy, rows, s), *torch.autograd.grad(loss, z)]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kwargs=SETTINGS, absent=LEFT_OUT, head=st.sampled_from(HEADS), dtypes=st.sampled_from(["ff", "fb", "bb", "bf"]))
def test_table_and_gradient_are_those_of_float64(
    isa: str, kwargs: dict[str, Any], absent: set[str], head: HeadSettings, dtypes: str
):
    given_dtype, out = ({"f": torch.float32, "b": torch.bfloat16}[x] for x in dtypes)
    logits, targets = problem(24, 131, given_dtype, scale=1.0)
    logprobs, _ = reference.logits_token_logprobs(logits.float(), targets, head, entropy=False)
    rows = ppo_constants(logprobs)._replace(**dict.fromkeys(absent))
    targets = torch.where(rows.weights != 0, targets, 1 << 40)
    logits[rows.weights == 0] = math.nan
    s = PPOSettings(**kwargs)
    dlogits = strided(torch.empty_like(logits, dtype=out), 1)
    table = native.ppo_rows(logits, targets, rows, s, head, entropy=True, dlogits=dlogits)
    baseline = plain_ppo(logits.float(), targets, rows, s, head)
    truth = plain_ppo(logits.double(), targets, rows, s, head)
    for i, name in enumerate(PPO_COLUMNS):
        assert_as_accurate(name, table[:, i], baseline[0][:, i], truth[0][:, i])
    assert_as_accurate("dlogits", dlogits, baseline[1].to(out), truth[1])
    assert table[rows.weights == 0].eq(0).all() and dlogits[rows.weights == 0].eq(0).all()


@settings(max_examples=60)
@given(kwargs=SETTINGS, absent=LEFT_OUT, with_entropy=st.booleans(), R=st.sampled_from([0, 1, 63, 2500]))
def test_ppo_tokens_is_the_table(kwargs: dict[str, Any], absent: set[str], with_entropy: bool, R: int):
    logprobs, entropy = -5 * torch.rand(R), torch.rand(R) if with_entropy else None
    rows = ppo_constants(logprobs)._replace(**dict.fromkeys(absent))
    logprobs[rows.weights == 0] = math.nan
    s = PPOSettings(**kwargs)
    table = native.ppo_tokens(logprobs, entropy, rows, s)
    live = rows.weights != 0
    truth = ppo_table(
        logprobs.double(), None if entropy is None else entropy.double(), rows.cleaned(live, torch.float64), s
    )
    baseline = ppo_table(logprobs, entropy, rows, s)
    for i, name in enumerate(PPO_COLUMNS):
        assert_as_accurate(name, table[:, i], baseline[:, i], truth[:, i])


def test_the_entropy_column_is_zero_and_the_rest_the_same_when_it_is_not_wanted(isa: str):
    """Old log-probs may be scored without entropy and the update run with it: the ratio must be 1 all the same."""
    for dtype in DTYPES:
        logits, targets = problem(9, 9001, dtype)
        old, none = native.logprob_rows(logits, targets, HEADS[1], entropy=False)
        with_entropy, _ = native.logprob_rows(logits, targets, HEADS[1], entropy=True)
        rows = PPORows(old, torch.randn(9), torch.rand(9))
        table = native.ppo_rows(logits, targets, rows, PPOSettings(), HEADS[1], entropy=False, dlogits=None)
        assert none is None and torch.equal(old, with_entropy)
        assert table[:, COLUMN["entropy"]].eq(0).all()
        assert table[:, COLUMN["ratio"]].eq(1).all() and table[:, COLUMN["log_ratio"]].eq(0).all()


def test_no_old_log_probs_means_the_policy_itself(isa: str):
    logits, targets = problem(9, 301)
    old, _ = native.logprob_rows(logits, targets, PLAIN, entropy=False)
    rows, s, out = PPORows(old, torch.randn(9), torch.rand(9)), PPOSettings(old_kl_coef=0.3), torch.zeros(2, 9, 301)
    given_ = native.ppo_rows(logits, targets, rows, s, PLAIN, entropy=False, dlogits=out[0])
    absent = native.ppo_rows(logits, targets, rows._replace(old_logprobs=None), s, PLAIN, entropy=False, dlogits=out[1])
    assert torch.equal(given_, absent) and torch.equal(out[0], out[1])


@pytest.mark.parametrize("head", HEADS, ids=["plain", "temperature", "softcap"])
def test_the_gradient_of_the_loss_is_that_of_its_table(isa: str, head: HeadSettings):
    """ppo_rows is logprob_rows_backward of column dlogprob and -entropy_coef * weight, bit for bit."""
    logits, targets = problem(17, 1003)
    logprobs, _ = native.logprob_rows(logits, targets, head, entropy=False)
    rows, s = ppo_constants(logprobs, dead=0.0), PPOSettings(kl_coef=0.1, entropy_coef=0.25)
    fused, apart = torch.empty(17, 1003), torch.empty(17, 1003)
    table = native.ppo_rows(logits, targets, rows, s, head, entropy=True, dlogits=fused)
    slopes = (table[:, COLUMN["dlogprob"]], -s.entropy_coef * rows.weights)
    native.logprob_rows_backward(logits, targets, *slopes, head, dlogits=apart)
    assert torch.equal(fused, apart)
    assert torch.equal(table, native.ppo_rows(logits, targets, rows, s, head, entropy=True, dlogits=None))


@pytest.mark.parametrize("V", [1, 5, 127, 1003, 9001])
@pytest.mark.parametrize("head", [HEADS[0], HEADS[2]], ids=["plain", "softcap"])
def test_dlogits_may_lie_over_the_logits(isa: str, V: int, head: HeadSettings):
    """In place, and bfloat16 from the first byte of every float32 row on: the numbers of a buffer of its own."""
    for dtype, out in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
    ):
        logits, targets = problem(5, V, dtype)
        rows = PPORows(None, torch.randn(5), torch.tensor([0.5, 0.0, 1.0, 2.0, 0.0]))
        s = PPOSettings(entropy_coef=0.1)
        apart = torch.empty(5, V, dtype=out)
        table = native.ppo_rows(logits, targets, rows, s, head, entropy=True, dlogits=apart)
        wide = logits.as_strided((5, V + 3), (V + 3, 1))
        over = wide.view(out)[:, :V] if out != dtype else logits
        again = native.ppo_rows(logits, targets, rows, s, head, entropy=True, dlogits=over)
        assert over.data_ptr() == logits.data_ptr()
        assert torch.equal(table, again) and torch.equal(over, apart)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bfloat16_gradients_are_rounded_to_nearest(isa: str, dtype: torch.dtype):
    """Half an ulp at most, and as often up as down."""
    logits, targets = problem(8, 4099, dtype)
    exact, rounded = torch.empty(8, 4099), torch.empty(8, 4099, dtype=torch.bfloat16)
    for out in (exact, rounded):
        native.logprob_rows_backward(logits, targets, torch.ones(8), None, PLAIN, dlogits=out)
    error = (rounded.double() - exact) / exact.abs()
    assert error.abs().max() <= 2.0**-8 * 1.001
    assert error.mean().abs() < 1e-5
    assert torch.equal(rounded.gather(1, targets[:, None]), exact.gather(1, targets[:, None]).bfloat16())


def test_results_do_not_depend_on_threads_or_on_the_rows_beside(isa: str):
    """Bit for bit: 1 to 5 threads, all rows at once or some of them, in place or not, at another address."""
    s = PPOSettings(entropy_coef=0.1, kl_coef=0.2)
    for dtype in DTYPES:
        logits, targets = problem(200, 1003, dtype)
        rows = ppo_constants(torch.randn(200) - 7)

        def run(some: slice, threads: int, shift: int, z=logits, t=targets, r=rows) -> tuple[Tensor, Tensor]:
            torch.set_num_threads(threads)
            moved = torch.cat([torch.zeros(shift, dtype=z.dtype), z[some].flatten()])[shift:].view(-1, 1003)
            table = native.ppo_rows(moved, t[some], r.take(some), s, PLAIN, entropy=True, dlogits=moved)
            return table, moved

        table, dlogits = run(slice(None), 1, 0)
        for some, threads, shift in (
            (slice(None), 2, 1),
            (slice(None), 5, 3),
            (slice(64, 67), 3, 5),
            (slice(7, 8), 1, 2),
        ):
            again = run(some, threads, shift)
            assert torch.equal(again[0], table[some]) and torch.equal(again[1], dlogits[some])


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


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(native.ISA_VARIABLE, "mmx")
    with pytest.raises(
        ValueError, match="FASTPPO_ISA = 'mmx' is no instruction set of this CPU and build; available: "
    ):
        native.logprob_rows(*problem(1, 5), PLAIN, entropy=False)
    monkeypatch.delenv(native.ISA_VARIABLE)
    assert native.chosen_isa() == next(iter(native.available_isas().values()))
    assert list(native.available_isas())[-1] == "portable"
