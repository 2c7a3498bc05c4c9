"""Laws of the value rows in C++: float64 decides, dead rows are not read, no row depends on its neighbours."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastppo_kernels.native.values import linear_value_rows, value_rows
from fastppo_kernels.table import VALUE_COLUMNS, value_table
from native_rows import UNRESET, assert_same_bits, isa, on_every_isa, on_threads
from numerics import assert_as_accurate, guarded

__all__ = ["isa"]  # a fixture

CLIPPED, DVALUE = VALUE_COLUMNS.index("clipped"), VALUE_COLUMNS.index("dvalue")


Rows = tuple[Tensor, Tensor, Tensor]


def rows(R: int, dead: float) -> Rows:
    """old_values, returns, weights, (R,) float32; a row of weight 0 holds NaN."""
    old, returns, weights = torch.randn(R), torch.randn(R), torch.randn(R)
    weights[torch.rand(R) < dead] = 0.0
    old, returns = (guarded(torch.where(weights != 0, x, torch.nan)) for x in (old, returns))
    return old, returns, guarded(weights)


def at(rows: Rows, index: Tensor | slice) -> Rows:
    return rows[0][index], rows[1][index], rows[2][index]


@given(
    R=st.sampled_from([0, 1, 3, 63]),
    clip=st.sampled_from([None, 0.2, 1.0]),
    dead=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 99),
)
def test_the_table_of_values_answers_to_float64(R: int, clip: float | None, dead: float, seed: int) -> None:
    torch.manual_seed(seed)
    old, returns, weights = rows(R, dead)
    values = guarded(torch.where(weights != 0, old + 0.5 * torch.randn(R), torch.nan))
    truth = value_table(values.double(), old.double(), returns.double(), weights.double(), clip)
    table = value_rows(values, old, returns, weights, clip)
    assert_as_accurate("table", table, value_table(values, old, returns, weights, clip), truth)
    assert torch.equal(table[:, CLIPPED].double(), truth[:, CLIPPED])
    assert table[weights == 0].eq(0).all() and torch.equal(table[:, 6], (weights != 0).float())


def test_a_value_inside_the_clip_range_is_not_clipped_by_rounding() -> None:
    """In float32, v_old + (v - v_old) may differ from v by an ulp, which makes the clipped square the larger one."""
    old, returns = 100 * torch.randn(5000), torch.randn(5000)
    table = value_rows(old + 0.1 * torch.randn(5000), old, returns, torch.ones(5000), 1.0)
    assert table[:, CLIPPED].eq(0).all()


@pytest.mark.parametrize("rubbish", [math.nan, math.inf])
def test_a_live_row_hides_no_nan(rubbish: float) -> None:
    one = torch.ones(2)
    table = value_rows(torch.tensor([rubbish, 1.0]), one, one, one, 0.2)
    assert not table[0, 0].isfinite() and table[1].isfinite().all()
    hidden, dhidden = torch.tensor([[rubbish, 1.0], [2.0, 3.0]]), torch.empty(2, 2)
    table, dweight = linear_value_rows(hidden, one, None, one, one, one, None, dhidden=dhidden)
    assert not table[0, 0].isfinite() and dweight is not None and not dweight[0].isfinite()
    assert table[1].isfinite().all() and dhidden[1].isfinite().all()


def linear_truth(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows, clip: float | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(table, dhidden, dweight) in plain PyTorch and `dtype`."""
    live = rows[2] != 0
    h, w = torch.where(live[:, None], hidden.to(dtype), 0), weight.to(dtype)
    values = h @ w + (0 if bias is None else bias.to(dtype).reshape(()))
    table = value_table(values, rows[0].to(dtype), rows[1].to(dtype), rows[2].to(dtype), clip)
    return table, table[:, DVALUE, None] * w, h.T @ table[:, DVALUE]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("H", [1, 5, 64, 127, 2049])
@settings(max_examples=30, suppress_health_check=UNRESET)
@given(
    R=st.sampled_from([0, 1, 3, 63, 258]),
    clip=st.sampled_from([None, 0.2]),
    dead=st.sampled_from([0.0, 0.4]),
    bias=st.sampled_from([None, (), (1,)]),
    pad=st.sampled_from([0, 3]),
)
def test_values_and_gradients_of_hidden_states(
    isa: str,
    R: int,
    H: int,
    clip: float | None,
    dead: float,
    bias: tuple[int, ...] | None,
    pad: int,
    dtype: torch.dtype,
) -> None:
    """Odd and unaligned strides, dead rows of NaN, more rows than one chunk; what lies between rows stays untouched."""
    given_rows = rows(R, dead)
    hidden = torch.randn(R, H + pad).to(dtype)
    hidden[given_rows[2] == 0] = torch.nan
    hidden = guarded(hidden)[:, pad:]
    weight, b = guarded(torch.randn(H) / H**0.5), None if bias is None else torch.randn(bias)
    whole = torch.full((R, H + pad), 7.0).to(dtype)
    table, dweight = linear_value_rows(hidden, weight, b, *given_rows, clip, dhidden=whole[:, pad:])
    assert dweight is not None
    baseline, truth = (linear_truth(hidden, weight, b, given_rows, clip, x) for x in (torch.float32, torch.float64))
    # Near a tie of the two squares float32 may clip what float64 does not: such rows are compared with float32 only.
    same = baseline[0][:, CLIPPED] == truth[0][:, CLIPPED]
    assert_as_accurate("table", table[same], baseline[0][same], truth[0][same], atol=1e-6)
    assert_as_accurate("dhidden", whole[:, pad:][same], baseline[1].to(dtype)[same], truth[1][same], atol=1e-6)
    if same.all():
        assert_as_accurate("dweight", dweight, baseline[2], truth[2], atol=1e-6)
    assert whole[:, :pad].eq(7).all() and whole[given_rows[2] == 0][:, pad:].eq(0).all()
    without, none = linear_value_rows(hidden, weight, b, *given_rows, clip, dhidden=None)
    assert none is None and torch.equal(without, table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_may_overwrite_the_hidden_states(isa: str, dtype: torch.dtype) -> None:
    hidden, weight, given_rows = torch.randn(70, 130).to(dtype), torch.randn(130), rows(70, 0.3)
    apart = torch.empty_like(hidden)
    expected = linear_value_rows(hidden, weight, None, *given_rows, 0.2, dhidden=apart)
    made = linear_value_rows(hidden, weight, None, *given_rows, 0.2, dhidden=hidden)
    assert torch.equal(hidden, apart)
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True) if a is not None and b is not None)


def test_bfloat16_gradients_are_rounded_to_nearest_and_keep_nan(isa: str) -> None:
    """A NaN whose bits are all ones must not carry into the sign: it would come out as -0."""
    hidden, weight = torch.randn(40, 333).bfloat16(), torch.randn(333)
    dhidden = torch.empty_like(hidden)
    table, _ = linear_value_rows(hidden, weight, None, *rows(40, 0.2), 0.2, dhidden=dhidden)
    assert torch.equal(dhidden, (table[:, DVALUE, None] * weight).bfloat16())
    ties, slope_1 = 1 + torch.arange(1, 256, 2) * 2**-8, (torch.zeros(40), -torch.ones(40), torch.ones(40))
    hidden = torch.zeros(40, len(ties)).bfloat16()
    tied = torch.empty_like(hidden)
    linear_value_rows(hidden, ties, None, *slope_1, None, dhidden=tied)
    assert torch.equal(tied, ties.bfloat16().expand_as(tied))
    ones = torch.full((3,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    linear_value_rows(hidden[:, :3], ones, None, *rows(40, 0.0), 0.2, dhidden=dhidden[:, :3])
    assert dhidden[:, :3].isnan().all()


def test_a_row_does_not_depend_on_the_others() -> None:
    hidden, weight, given_rows, order = torch.randn(150, 77), torch.randn(77), rows(150, 0.2), torch.randperm(150)
    table, dweight = linear_value_rows(hidden, weight, None, *given_rows, 0.2, dhidden=torch.empty_like(hidden))
    again = linear_value_rows(hidden, weight, None, *given_rows, 0.2, dhidden=torch.empty_like(hidden))
    assert dweight is not None and again[1] is not None
    assert torch.equal(table, again[0]) and torch.equal(dweight, again[1])
    shuffled, _ = linear_value_rows(hidden[order], weight, None, *at(given_rows, order), 0.2, dhidden=None)
    assert torch.equal(shuffled, table[order])
    alone, _ = linear_value_rows(hidden[:1], weight, None, *at(given_rows, slice(1)), 0.2, dhidden=None)
    assert torch.equal(alone, table[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_neither_threads_nor_instruction_sets_change_a_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dozen pieces of work, the last one short, and a table of values alone in two."""
    hidden, weight, given_rows = torch.randn(1500, 777).to(dtype), torch.randn(777), rows(1500, 0.2)
    many = rows(5000, 0.2)

    def made() -> tuple[Tensor, ...]:
        dhidden = torch.empty_like(hidden)
        table, dweight = linear_value_rows(hidden, weight, None, *given_rows, 0.2, dhidden=dhidden)
        assert dweight is not None
        return table, dweight, dhidden, value_rows(many[0].nan_to_num(), *many, 0.2)

    assert_same_bits([*on_threads(made), *on_every_isa(monkeypatch, made).values()])


def test_weight_gradients_of_many_rows_keep_their_digits(isa: str) -> None:
    """20,000 rows of one sign, added one after the other in float32, would lose three digits."""
    hidden, one = torch.rand(20_000, 3), torch.ones(20_000)
    given_rows = torch.zeros(20_000), -one, one
    _, dweight = linear_value_rows(hidden, torch.zeros(3), None, *given_rows, None, dhidden=torch.empty_like(hidden))
    assert dweight is not None
    assert torch.allclose(dweight.double(), hidden.double().sum(0), rtol=3e-7)


def test_what_does_not_fit_is_refused() -> None:
    hidden, given_rows = torch.zeros(2, 3), (torch.zeros(2), torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="hidden must be float32 or bfloat16, got torch.float16"):
        linear_value_rows(hidden.half(), torch.zeros(3), None, *given_rows, None, dhidden=None)
    for dhidden in (torch.zeros(2, 4), hidden.bfloat16(), torch.zeros(3, 2).T):
        with pytest.raises(ValueError, match=r"dhidden must be \(2, 3\) torch.float32, last stride 1"):
            linear_value_rows(hidden, torch.zeros(3), None, *given_rows, None, dhidden=dhidden)
