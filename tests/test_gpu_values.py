"""Laws of the Triton kernels of the critic's loss."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastppo_kernels import reference
from fastppo_kernels.gpu import launch, values
from fastppo_kernels.table import VALUE_COLUMNS, value_table
from numerics import DEVICE, assert_as_accurate, guarded

NAMES = ("old_values", "returns", "weights")
# numpy interprets the kernels where there is no GPU, and warns of NaN and infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
NAN = float("nan")


def rows_of(num_rows: int, dead: float = 0.3) -> tuple[Tensor, ...]:
    """(values, old values, returns, weights), (R,) each on the CPU; NaN in the rows without a weight."""
    weights = torch.where(torch.rand(num_rows) < dead, 0.0, torch.rand(num_rows) + 0.1)
    numbers = (torch.where(weights == 0, NAN, torch.randn(num_rows)) for _ in range(3))
    return *(guarded(x) for x in numbers), weights


def assert_table(name: str, made: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Every column as accurate as plain float32; what is 0 or 1 exactly right."""
    assert made.shape == truth.shape and made.dtype == torch.float32
    for i, column in enumerate(VALUE_COLUMNS):
        if column in ("clipped", "live", "unused"):
            assert torch.equal(made[:, i].cpu().double(), truth[:, i]), column
        else:
            assert_as_accurate(f"{name} {column}", made[:, i].cpu(), plain[:, i], truth[:, i])


@settings(max_examples=25)
@given(R=st.sampled_from([0, 1, 3, 63, 700]), clip=st.sampled_from([None, 0.2, 1e-3]), seed=st.integers(0, 99))
def test_table_of_values_answers_to_float64(R: int, clip: float | None, seed: int) -> None:
    torch.manual_seed(seed)
    rows = rows_of(R)
    made = values.value_rows(*(x.to(DEVICE) for x in rows), clip=clip)
    assert_table("value", made, value_table(*rows, clip=clip), value_table(*(x.double() for x in rows), clip=clip))


def test_a_value_inside_the_clip_range_is_never_counted_as_clipped() -> None:
    """old + (v - old) is not v in float32, and one ulp more would make a row count as clipped."""
    v, old, target = (torch.randn(2000) for _ in range(3))
    made = values.value_rows(*(x.to(DEVICE) for x in (v, old, target, torch.ones(2000))), clip=20.0).cpu()
    assert made[:, VALUE_COLUMNS.index("clipped")].eq(0).all()
    assert torch.equal(made[:, VALUE_COLUMNS.index("dvalue")], v - target)


@pytest.mark.parametrize("poisoned", [0, 2, 3])
def test_a_nan_of_a_live_row_shows_there_and_nowhere_else(poisoned: int) -> None:
    """In the value, the return or the weight."""
    rows = rows_of(9, dead=0.0)
    rows[poisoned][4] = NAN
    made = values.value_rows(*(x.to(DEVICE) for x in rows), clip=0.2).cpu()
    assert made[4, 0].isnan() and made[4, VALUE_COLUMNS.index("dvalue")].isnan()
    assert made[torch.arange(9) != 4].isfinite().all()


def head_of(R: int, H: int, dtype: torch.dtype, pad: int = 0) -> tuple[Tensor, Tensor]:
    """hidden (R, H) with rows H + pad apart, NaN between and behind them, and weight (H,)."""
    hidden = torch.full((R, H + pad), NAN)
    hidden[:, :H] = torch.randn(R, H)
    return guarded(hidden.to(dtype))[:, :H], guarded((torch.randn(H) / H**0.5).to(dtype))


def truth_of(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Any, clip: float | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(table, dhidden, dweight) by the reference and autograd, in `dtype`."""
    live = rows[-1] != 0
    hidden, weight = torch.where(live[:, None], hidden, 0).to(dtype), weight.to(dtype)
    v = reference.value_head(hidden, weight, None if bias is None else bias.to(dtype), live)
    table = value_table(v, *(x.to(dtype) for x in rows), clip=clip)
    dvalue = table[:, VALUE_COLUMNS.index("dvalue")]
    return table, torch.where(live[:, None], dvalue[:, None] * weight, 0), dvalue @ hidden


@settings(max_examples=25)
@given(
    R=st.sampled_from([0, 33, 70]),  # 1 and 3 have the numbers of 70, which another test holds
    H=st.sampled_from([1, 5, 127, 128, 300]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    clip=st.sampled_from([None, 0.2]),
    bias=st.sampled_from([None, (), (1,)]),
    pad=st.sampled_from([0, 3]),
    seed=st.integers(0, 99),
)
def test_value_head_answers_to_float64(
    R: int, H: int, dtype: torch.dtype, clip: float | None, bias: tuple | None, pad: int, seed: int
) -> None:
    """Table and both gradients, from rows at any stride; dhidden float32, so that only the sums are judged."""
    torch.manual_seed(seed)
    (hidden, weight), rows = head_of(R, H, dtype, pad), rows_of(R)[1:]
    hidden[rows[-1] == 0] = NAN
    b = None if bias is None else torch.randn(bias)
    out = torch.full((R, H + 2 * pad), 7.0, device=DEVICE)
    given_rows = [x.to(DEVICE) for x in rows]
    on_device = (hidden.to(DEVICE), weight.to(DEVICE), None if b is None else b.to(DEVICE))
    table, dweight = values.linear_value_rows(*on_device, *given_rows, clip=clip, dhidden=out[:, :H])
    assert dweight is not None and out[:, H:].eq(7).all()
    plain = truth_of(hidden, weight, b, rows, clip, torch.float32)
    truth = truth_of(hidden, weight, b, rows, clip, torch.float64)
    assert_table("linear", table, plain[0], truth[0])
    assert_as_accurate("dhidden", out[:, :H].cpu(), plain[1], truth[1])
    assert_as_accurate("dweight", dweight.cpu(), plain[2], truth[2])
    forward, nothing = values.linear_value_rows(*on_device, *given_rows, clip=clip, dhidden=None)
    assert nothing is None and torch.equal(forward, table)


def test_gradient_of_hidden_is_rounded_once_to_its_dtype() -> None:
    """2^-7: the interpreter truncates what a GPU rounds to nearest."""
    (hidden, weight), rows = head_of(40, 300, torch.bfloat16), rows_of(40)[1:]
    made = torch.empty(40, 300, dtype=torch.bfloat16, device=DEVICE)
    arguments = (hidden.to(DEVICE), weight.to(DEVICE), None, *(x.to(DEVICE) for x in rows))
    values.linear_value_rows(*arguments, clip=0.2, dhidden=made)
    _, truth, _ = truth_of(hidden, weight, None, rows, 0.2, torch.float64)
    assert ((made.cpu().double() - truth).abs() <= 2**-7 * truth.abs()).all()


def test_a_row_of_weight_zero_gets_zeros_even_from_an_infinite_head() -> None:
    """0 * inf is NaN, and 0 * NaN of its hidden states too."""
    hidden, weight = torch.full((5, 20), NAN), torch.randn(20)
    weight[3] = float("inf")
    made = torch.empty(5, 20, device=DEVICE)
    numbers = [torch.full((5,), NAN), torch.full((5,), NAN), torch.zeros(5)]
    arguments = (hidden.to(DEVICE), weight.to(DEVICE), None, *(x.to(DEVICE) for x in numbers))
    table, dweight = values.linear_value_rows(*arguments, clip=0.2, dhidden=made)
    assert dweight is not None
    assert all(x.eq(0).all() for x in (table, made, dweight))


def test_the_numbers_of_a_row_depend_on_no_other_row_and_repeat() -> None:
    (hidden, weight), rows = head_of(70, 200, torch.float32), rows_of(70, dead=0.0)[1:]
    whole, alone = (torch.empty(70, 200, device=DEVICE) for _ in range(2))

    def run(part: slice, dhidden: Tensor) -> tuple[Tensor, Tensor | None]:
        arguments = (hidden[part].to(DEVICE), weight.to(DEVICE), None, *(x[part].to(DEVICE) for x in rows))
        return values.linear_value_rows(*arguments, clip=0.2, dhidden=dhidden[part])

    table, dweight = run(slice(0, 70), whole)
    again, dweight_again = run(slice(0, 70), alone)
    assert dweight is not None and dweight_again is not None
    assert torch.equal(table, again) and torch.equal(dweight, dweight_again)
    for part in (slice(0, 1), slice(1, 4), slice(31, 32), slice(32, 33), slice(67, 70)):
        alone.fill_(NAN)
        assert torch.equal(table[part], run(part, alone)[0]) and torch.equal(whole[part], alone[part])


@pytest.mark.parametrize("num_lines", [0, 1, 32, 70])
def test_lines_of_dweight_are_added_up(num_lines: int) -> None:
    lines = guarded(torch.randn(num_lines, 45))
    made = values._sum_lines(lines.to(DEVICE)).cpu()
    assert_as_accurate("dweight", made, lines.sum(0), lines.double().sum(0))


@pytest.mark.parametrize("hidden_size", [1, 896, 4096, 16384, 100_000])
def test_a_program_covers_its_rows_and_columns_exactly(hidden_size: int) -> None:
    tile = values.linear_tile(hidden_size)
    assert values.PROGRAM_ROWS % tile.rows == 0 and tile.columns >= hidden_size
    assert hidden_size > 16384 or tile.rows * tile.columns <= 32 * 32 * tile.num_warps


def test_cpu_tensors_without_the_interpreter_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="the Triton kernels got CPU tensors"):
        values.value_rows(*rows_of(3), clip=None)
