"""Laws of the Triton sampler."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastppo_kernels import reference
from fastppo_kernels.gpu import launch, sampling
from numerics import DEVICE, assert_as_accurate, guarded

# numpy interprets the kernels where there is no GPU, and warns of NaN and infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
NAN = float("nan")
LAST = 1.0 - 2**-24  # the last float32 before 1
ROUNDING = 3e-6  # of a cumulative sum in float32, relative to its total


def draw(
    logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    made = sampling.sample(logits.to(DEVICE), uniform.to(DEVICE), temperature=temperature, top_k=top_k, top_p=top_p)
    assert made[0].dtype == torch.int64 and made[1].dtype == made[2].dtype == torch.float32
    return made[0].cpu(), made[1].cpu(), made[2].cpu()


def kept_columns(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """(R, V) float64: probabilities of the columns kept, before they are renormalised; ties go to the lower column."""
    p = (logits.double() / temperature).softmax(1)
    ranked, order = p.sort(dim=1, descending=True, stable=True)
    if top_k:
        ranked[:, top_k:] = 0
    share = ranked / ranked.sum(1, keepdim=True)
    ranked = torch.where(share.cumsum(1) - share < top_p, ranked, 0)
    return torch.zeros_like(p).scatter(1, order, ranked)


def assert_drawn(kept: Tensor, uniform: Tensor, made: tuple[Tensor, Tensor, Tensor]) -> None:
    """Each token is where the float64 CDF crosses its uniform, up to rounding, and both log-probs are its own."""
    tokens, logprobs, log_mass = made
    total = kept.sum(1)
    end = (kept.cumsum(1) / total[:, None]).gather(1, tokens[:, None]).squeeze(1)
    mass = kept.gather(1, tokens[:, None]).squeeze(1)
    assert (mass > 0).all()
    assert (uniform < end + ROUNDING).all() and (uniform >= end - mass / total - ROUNDING).all()
    assert ((logprobs - (mass / total).log()).abs() <= 5e-6).all()
    assert ((log_mass - total.log()).abs() <= 2e-6).all()


@pytest.mark.parametrize("V", [1, 5, 127, 128, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block", [64, 8192])
def test_token_is_where_the_float64_cdf_crosses_the_uniform(
    V: int, dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows at an odd stride with NaN between and behind them; the first and the last uniform among others."""
    monkeypatch.setattr(sampling, "BLOCK", block)
    logits = guarded(torch.cat([3 * torch.randn(6, V), torch.full((6, 3), NAN)], dim=1).to(dtype))[:, :V]
    uniform = torch.cat([torch.tensor([0.0, LAST, 2**-24]), torch.rand(3)])
    for temperature in (1.0, 0.6):
        made = draw(logits, uniform, temperature)
        assert_drawn(kept_columns(logits, temperature, 0, 1.0), uniform, made)
        assert made[2].eq(0).all()


def test_a_real_vocabulary() -> None:
    logits, uniform = 3 * torch.randn(4, 32000), torch.rand(4)
    assert_drawn(kept_columns(logits, 1.0, 0, 1.0), uniform, draw(logits, uniform))
    assert_drawn(kept_columns(logits, 0.8, 100, 0.9), uniform, draw(logits, uniform, 0.8, 100, 0.9))


@pytest.mark.parametrize("offset", [150.0, -150.0, 1e4, -1e4])
def test_a_common_offset_costs_no_accuracy(offset: float) -> None:
    """The logits are rounded by the offset, but what is done with them is not."""
    logits, uniform = torch.randn(20, 500) + offset, torch.rand(20)
    made = draw(logits, uniform, 0.6)
    assert_drawn(kept_columns(logits, 0.6, 0, 1.0), uniform, made)
    tokens = made[0][:, None]
    plain = (logits / 0.6).log_softmax(1).gather(1, tokens).squeeze(1)
    truth = (logits.double() / 0.6).log_softmax(1).gather(1, tokens).squeeze(1)
    assert_as_accurate("logprobs", made[1], plain, truth)


@settings(max_examples=25)
@given(
    V=st.sampled_from([2, 17, 50, 100]),
    top_k=st.sampled_from([0, 1, 2, 10, 99]),
    top_p=st.sampled_from([1.0, 0.999, 0.7, 0.2, 1e-9]),
    temperature=st.sampled_from([1.0, 0.6]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_truncation_keeps_what_the_reference_keeps(
    V: int, top_k: int, top_p: float, temperature: float, dtype: torch.dtype, seed: int
) -> None:
    """bfloat16 logits tie often; the fewest most probable columns whose mass reaches top_p, the lower of equal ones."""
    torch.manual_seed(seed)
    before, sampling.BLOCK = sampling.BLOCK, 32
    logits, uniform = (2 * torch.randn(2, V)).to(dtype), torch.rand(2)
    made = draw(logits, uniform, temperature, top_k, top_p)
    sampling.BLOCK = before
    assert_drawn(kept_columns(logits, temperature, top_k, top_p), uniform, made)
    if dtype == torch.float32:  # no ties
        expected, _ = reference.sample(logits.double(), uniform, temperature=temperature, top_k=top_k, top_p=top_p)
        assert torch.equal(made[0], expected)


@pytest.mark.parametrize("block", [16, 64])
def test_of_equal_columns_the_lowest_are_kept(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten columns of 0.0 and -0.0, which are equal, among others far below: k of them, or the share top_p of them."""
    monkeypatch.setattr(sampling, "BLOCK", block)
    logits = torch.full((1, 40), -20.0)
    columns = torch.arange(3, 40, 4)
    logits[:, columns] = torch.tensor([0.0, -0.0]).repeat(5)
    uniform = (torch.arange(10) + 0.5) / 10
    for top_k, top_p, kept in ((3, 1.0, 3), (0, 0.35, 4), (6, 0.6, 4), (6, 0.99, 6), (10, 1.0, 10)):
        tokens, logprobs, log_mass = draw(logits.expand(10, -1), uniform, 1.0, top_k, top_p)
        assert torch.equal(tokens.unique(), columns[:kept]), (top_k, top_p)
        assert torch.allclose(logprobs, torch.tensor(-math.log(kept))) and torch.allclose(
            log_mass, torch.tensor(math.log(kept / 10)), atol=1e-6
        )


def test_a_uniform_on_a_boundary_of_the_cdf_belongs_to_the_column_above_it() -> None:
    uniform = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.125, 0.875])
    truncations: tuple[dict[str, Any], ...] = ({}, {"top_k": 4}, {"top_p": 0.999})
    for truncation in truncations:
        logits = torch.tensor([-math.inf, 1.0, 1.0, -50.0, 1.0, 1.0]).expand(6, -1)
        assert draw(logits, uniform, **truncation)[0].tolist() == [1, 2, 4, 5, 1, 5]


def test_zeros_of_both_signs_are_equal() -> None:
    """They differ in the order in which the threshold is searched, and must not hold the search up."""
    logits = torch.tensor([[-0.0, -5.0, 0.0, 1.0, -0.0, -7.0, 0.0]])
    uniform = (torch.arange(8) + 0.5) / 8
    for top_k, kept in ((2, [0, 3]), (3, [0, 2, 3]), (4, [0, 2, 3, 4]), (5, [0, 2, 3, 4, 6])):
        for flipped in (logits, torch.where(logits == 0, -logits, logits)):
            assert draw(flipped.expand(8, -1), uniform, top_k=top_k)[0].unique().tolist() == kept


@pytest.mark.parametrize("truncation", [{}, {"top_k": 2}, {"top_k": 7}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.999}])
@pytest.mark.parametrize("lowest", [-math.inf, torch.finfo(torch.float32).min, -1e30])
def test_a_token_of_probability_zero_is_never_drawn(truncation: dict[str, Any], lowest: float) -> None:
    """Columns masked with -inf or the least number, at both ends and between, fewer than top_k left, u at both ends."""
    logits = torch.full((4, 300), lowest)
    logits[:, [1, 2, 140]] = torch.tensor([0.0, 1.0, 0.5])
    tokens, logprobs, log_mass = draw(logits, torch.tensor([0.0, LAST, 0.5, 1.0]), **truncation)
    assert torch.isin(tokens, torch.tensor([1, 2, 140])).all()
    assert logprobs.isfinite().all() and log_mass.isfinite().all()


def test_rounding_of_partial_sums_cannot_reach_a_token_of_probability_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uniforms within a rounding error of the mass of columns 0 to 99; 100 to 199 have none."""
    monkeypatch.setattr(sampling, "BLOCK", 64)
    logits = torch.full((1, 256), -math.inf)
    logits[:, :100], logits[:, 200] = torch.randn(100), 4.0
    mass = logits.double().softmax(1)[:, :100].sum()
    uniform = (mass + torch.linspace(-3e-7, 3e-7, 40)).float()
    tokens, logprobs, _ = draw(logits.expand(40, -1), uniform)
    assert logprobs.isfinite().all() and ((tokens < 100) | (tokens == 200)).all()


def test_top_k_one_is_greedy_and_certain() -> None:
    logits = torch.randn(10, 500)
    tokens, logprobs, log_mass = draw(logits, torch.rand(10), top_k=1)
    assert torch.equal(tokens, logits.argmax(1)) and logprobs.eq(0).all()
    assert torch.allclose(log_mass, logits.log_softmax(1).amax(1), atol=1e-6)


@pytest.mark.parametrize("truncation", [{}, {"top_k": 7}, {"top_p": 0.8}, {"top_k": 500, "top_p": 1.0}])
def test_both_log_probs_make_the_untruncated_one(truncation: dict[str, Any]) -> None:
    """What a scorer at the same temperature gives; nothing cut means exactly no mass lost."""
    logits = 2 * torch.randn(10, 300)
    tokens, logprobs, log_mass = draw(logits, torch.rand(10), 0.7, **truncation)
    scored = (logits.double() / 0.7).log_softmax(1).gather(1, tokens[:, None]).squeeze(1)
    assert torch.allclose((logprobs + log_mass).double(), scored, atol=5e-6)
    assert log_mass.eq(0).all() == (truncation in ({}, {"top_k": 500, "top_p": 1.0}))


@pytest.mark.parametrize("truncation", [{}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.5}])
def test_a_nan_shows_in_its_row_and_nowhere_else(truncation: dict[str, Any]) -> None:
    """A row with a NaN, one of nothing but -inf, one with +inf: some column of the row, log-prob NaN."""
    logits = torch.randn(5, 50)
    logits[1, 20], logits[2], logits[3, 4] = NAN, -math.inf, math.inf
    tokens, logprobs, _ = draw(logits, torch.rand(5), **truncation)
    assert logprobs.isnan().tolist() == [False, True, True, True, False]
    assert ((tokens >= 0) & (tokens < 50)).all()


def test_a_row_is_drawn_alike_alone_and_twice() -> None:
    logits, uniform = torch.randn(3, 400).bfloat16(), torch.rand(3)
    for cut in ((1.0, 0, 1.0), (0.8, 20, 0.9)):
        whole, again = draw(logits, uniform, *cut), draw(logits, uniform, *cut)
        alone = [draw(logits[i : i + 1], uniform[i : i + 1], *cut) for i in range(3)]
        for i, x in enumerate(whole):
            assert torch.equal(x, torch.cat([part[i] for part in alone])) and torch.equal(x, again[i])


def test_uniforms_are_float32_and_a_float64_is_rounded_to_one() -> None:
    """Up to 1, which draws the last column that has any mass, as the number next to 1 does."""
    logits = torch.randn(6, 100)
    uniform = torch.rand(6, dtype=torch.float64)
    uniform[:3] = torch.tensor([1 - 1e-12, 1 - 2**-25, 0.0], dtype=torch.float64)
    for cut in ((1.0, 0, 1.0), (0.8, 20, 0.9)):
        made = draw(logits, uniform, *cut)
        assert all(torch.equal(a, b) for a, b in zip(made, draw(logits, uniform.float(), *cut), strict=True))
        assert made[1].isfinite().all()


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)], ids=str)
def test_dtypes_that_would_be_rounded_are_refused(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """256 different uniforms are no uniforms."""
    with pytest.raises(ValueError, match=r"uniform float32 or float64, got .* convert them with \.float"):
        draw(torch.zeros(2, 4, dtype=dtypes[0]), torch.zeros(2, dtype=dtypes[1]))


def test_no_rows_and_transposed_logits() -> None:
    assert all(x.shape == (0,) for x in draw(torch.zeros(0, 10), torch.zeros(0)))
    logits, uniform = torch.randn(30, 4).T, torch.rand(4)
    assert torch.equal(draw(logits, uniform)[0], draw(logits.contiguous(), uniform)[0])


def test_cpu_tensors_without_the_interpreter_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="the Triton kernels got CPU tensors"):
        sampling.sample(torch.zeros(2, 4), torch.zeros(2), temperature=1.0, top_k=0, top_p=1.0)
