"""Laws of the C++ product, on every instruction set: what it computes, and what its bits depend on."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastppo_kernels.native import isa as isas
from fastppo_kernels.native import matmul
from numerics import assert_as_accurate, guarded

SIZES = [1, 5, 8, 31, 33, 64, 257]  # around a strip's rows and columns, and above a tile
DEPTHS = [1, 17, 128, 129, 300]  # around a block


@pytest.fixture(params=isas.available_isas(), autouse=True)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(isas.ISA_VARIABLE, request.param)
    return request.param


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same matrix in other memory."""
    if layout == "columns":
        return x.T.contiguous().T
    if layout == "gaps":
        return torch.full((2 * x.shape[0], 3 * x.shape[1]), torch.nan, dtype=x.dtype)[::2, ::3].copy_(x)
    if layout == "long rows":
        return torch.full((x.shape[0], x.shape[1] + 5), torch.nan, dtype=x.dtype)[:, : x.shape[1]].copy_(x)
    return guarded(x)


LAYOUTS = ["rows", "columns", "gaps", "long rows"]


@pytest.mark.parametrize(("M", "N"), list(itertools.product(SIZES, SIZES)))
def test_it_is_the_product(M: int, N: int, threads: int) -> None:
    for K in DEPTHS:
        a, b, bias = torch.randn(M, K), torch.randn(K, N), torch.randn(N)
        exact = a.double() @ b.double() + bias.double()
        assert_as_accurate(f"K = {K}", matmul(a, b, bias), a @ b + bias, exact, atol=1e-5)


@pytest.mark.parametrize("dtypes", list(itertools.product([torch.float32, torch.bfloat16], repeat=2)), ids=str)
@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, LAYOUTS)), ids="-".join)
def test_neither_the_layout_nor_the_dtype_of_an_operand_matters(
    layouts: tuple[str, str], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    a, b = torch.randn(37, 150).to(dtypes[0]), torch.randn(150, 70).to(dtypes[1])
    wanted = matmul(a.float(), b.float())
    assert torch.equal(matmul(laid_out(a, layouts[0]), laid_out(b, layouts[1])), wanted)
    assert torch.equal(matmul(a[:1].expand(4, 150), b), wanted[:1].expand(4, 70))


@pytest.mark.parametrize("K", [128, 200])
def test_the_bits_of_an_element_depend_on_its_row_and_its_column_alone(K: int, threads: int) -> None:
    a, b, bias = torch.randn(300, K), torch.randn(K, 290), torch.randn(290)
    whole = matmul(a, b, bias)
    for rows, columns in itertools.product((slice(0, 1), slice(3, 40), slice(100, 300)), repeat=2):
        assert torch.equal(matmul(a[rows], b[:, columns], bias[columns]), whole[rows, columns])
    torch.set_num_threads(2)
    assert torch.equal(matmul(a, b, bias), whole)


def test_every_instruction_set_with_a_fused_multiply_add_gives_the_same_bits(
    isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = [name for name in isas.available_isas() if name != "portable"]  # which has none on x86-64
    if isa not in fused:
        pytest.skip("has none on x86-64")
    a, b = torch.randn(50, 300), torch.randn(300, 90)
    made = matmul(a, b)
    for other in fused:
        monkeypatch.setenv(isas.ISA_VARIABLE, other)
        assert torch.equal(made, matmul(a, b)), other


@pytest.mark.parametrize("N", [3, 32, 70])
def test_it_adds_to_what_is_there_and_writes_nowhere_else(N: int) -> None:
    memory = torch.randn(20, N + 9)
    before = memory.clone()
    a, b, bias = torch.randn(20, 300), torch.randn(300, N), torch.randn(N)
    made = matmul(a, b, bias, out=memory[:, 4 : 4 + N], accumulate=True)
    assert made.data_ptr() == memory[:, 4:].data_ptr()
    exact = before[:, 4 : 4 + N].double() + a.double() @ b.double() + bias.double()
    assert_as_accurate("sum", made, before[:, 4 : 4 + N] + (a @ b + bias), exact)
    made.zero_()
    before[:, 4 : 4 + N].zero_()
    assert torch.equal(memory, before)


def test_a_product_over_nothing_is_the_bias() -> None:
    bias = torch.randn(40)
    assert torch.equal(matmul(torch.empty(5, 0), torch.empty(0, 40), bias), bias.expand(5, 40))
    assert matmul(torch.empty(0, 7), torch.empty(7, 3)).shape == (0, 3)
    assert matmul(torch.empty(2, 7), torch.empty(7, 0)).shape == (2, 0)


def test_what_is_not_a_number_reaches_its_row_or_column_alone() -> None:
    a, b = torch.randn(20, 30), torch.randn(30, 40)
    a[3, 5], b[6, 7] = torch.nan, torch.inf
    made, plain = matmul(a, b).isfinite(), (a @ b).isfinite()
    assert torch.equal(made, plain) and made.sum() == 19 * 39


B = torch.zeros(5, 3)


@pytest.mark.parametrize(
    ("b", "bias", "out"),
    [
        (torch.zeros(6, 3), None, None),
        (torch.zeros(5), None, None),
        (B.double(), None, None),
        (B.to("meta"), None, None),
        (B, torch.zeros(4), None),
        (B, torch.zeros(3, dtype=torch.float64), None),
        (B, torch.zeros(3, device="meta"), None),
        (B, None, torch.zeros(2, 4)),
        (B, None, torch.zeros(3, 2).T),
        (B, None, torch.zeros(3).expand(2, 3)),
        (B, None, torch.zeros(2, 3, dtype=torch.complex64).conj().imag),
        (B, None, torch.zeros(2, 3, dtype=torch.bfloat16)),
        (B, None, torch.zeros(2, 3, device="meta")),
    ],
)
def test_what_does_not_fit_is_refused(b: Tensor, bias: Tensor | None, out: Tensor | None) -> None:
    with pytest.raises(ValueError, match=r"must be float32 .* on the CPU; got a \(2, 5\) torch.float32 on cpu, b "):
        matmul(torch.zeros(2, 5), b, bias, out=out)


def test_a_view_whose_sign_is_elsewhere_has_its_sign() -> None:
    x = torch.randn(4, 4, dtype=torch.complex64).conj().imag
    assert x.is_neg() and torch.equal(matmul(x, torch.eye(4)), x)
    assert torch.equal(matmul(torch.zeros(1, 4), torch.eye(4), x[0]), x[:1])
