"""Laws of the C++ kernels of the PPO objective, for every instruction set that this CPU has."""

import math
from typing import Any

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
from native_rows import COLUMN, DTYPES, HEADS, PLAIN, isa, ppo_constants, problem, strided
from numerics import assert_as_accurate

__all__ = ["isa"]  # a fixture


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
