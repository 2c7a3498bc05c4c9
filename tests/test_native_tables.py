"""Laws of the sums over a table in C++: those of PyTorch in float64, the same bits for any number of threads."""

import pytest
import torch

from fastppo_kernels.native.tables import table_sums
from fastppo_kernels.table import table_sums as by_torch
from native_rows import assert_same_bits, isa, on_every_isa, on_threads

__all__ = ["isa"]  # a fixture


@pytest.mark.parametrize("columns", [8, 16])
@pytest.mark.parametrize("R", [0, 1, 255, 256, 257, 5000])
def test_sums_squares_and_maxima_are_those_of_pytorch(R: int, columns: int, isa: str) -> None:
    table = torch.randn(R, columns) * 10 ** torch.linspace(-8, 8, columns)
    made, truth = table_sums(table), by_torch(table)
    absolute = by_torch(table.abs())  # what cancels in a sum does not count
    assert made.dtype == torch.float64 and made.shape == (3, columns)
    assert ((made - truth).abs() <= 1e-13 * absolute).all()
    assert torch.equal(made[2], truth[2])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("row", [0, 255, 256, 999])
def test_what_is_not_finite_shows_in_its_column_alone(bad: float, row: int) -> None:
    table = torch.randn(1000, 16)
    table[row, 3] = bad
    torch.testing.assert_close(table_sums(table), by_torch(table), rtol=1e-12, atol=1e-12, equal_nan=True)


def test_no_bit_depends_on_threads_or_on_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.randn(100_000, 16)
    made = on_every_isa(monkeypatch, lambda: [table_sums(table)])
    assert_same_bits([*made.values(), *on_threads(lambda: [table_sums(table)])])
