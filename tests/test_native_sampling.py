"""Laws of sampling in C++: the float64 CDF decides, whatever the dtype, the truncation and the row's neighbours."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastppo_kernels import sample as public_sample
from fastppo_kernels.native.sampling import _library, sample
from native_rows import UNRESET, assert_same_bits, isa, on_every_isa, on_threads
from numerics import assert_as_accurate, guarded

__all__ = ["isa"]  # a fixture

EDGES = torch.tensor([0.0, 1.0 - 2**-24, 0.5, 2**-24])  # the first and the last float32 of [0, 1) among them
TRUNCATIONS: list[dict[str, Any]] = [{}, {"top_k": 7}, {"top_p": 0.8}, {"top_k": 40, "top_p": 0.8}]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def draw(logits: Tensor, uniform: Tensor, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    return sample(logits, uniform, **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings))


def truth(
    logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(probabilities, renormalised after truncation; mass before each rank; ranks of columns), (R, V) float64.

    Columns are ranked by logit, equal ones by column: the definition, by a full sort.
    """
    p = (logits.double() / temperature).softmax(1)
    order = logits.double().sort(dim=1, descending=True, stable=True).indices
    ranked = p.gather(1, order)
    if top_k:
        ranked[:, top_k:] = 0
    ranked = ranked / ranked.sum(1, keepdim=True)
    before = ranked.cumsum(1) - ranked
    kept = torch.where(before < top_p, ranked, 0) if top_p < 1 else ranked
    kept = torch.zeros_like(p).scatter(1, order, kept)
    return kept / kept.sum(1, keepdim=True), before, order.argsort(1)


def assert_draws(logits: Tensor, uniform: Tensor, drawn: tuple[Tensor, Tensor, Tensor], **settings: Any) -> None:
    """Every token lies where the float64 CDF crosses its uniform, to 1e-6, and has its log-probs to 5e-6."""
    tokens, logprobs, log_mass = drawn
    assert tokens.dtype == torch.int64 and logprobs.dtype == log_mass.dtype == torch.float32
    p, before, _ = truth(logits, **settings)
    pick = tokens[:, None]
    end, mass = (x.gather(1, pick).squeeze(1) for x in (p.cumsum(1), p))
    assert (uniform < end + 1e-6).all() and (uniform >= end - mass - 1e-6).all()
    assert torch.allclose(logprobs.double(), mass.log(), atol=5e-6, rtol=0)
    untruncated = (logits.double() / settings.get("temperature", 1.0)).log_softmax(1).gather(1, pick).squeeze(1)
    assert torch.allclose((logprobs + log_mass).double(), untruncated, atol=5e-6, rtol=0)
    assert (log_mass <= 0).all()


@DTYPES
@pytest.mark.parametrize("V", [1, 5, 64, 127, 255, 256, 257, 1000, 32_000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("offset", [0.0, 150.0, -150.0])
def test_token_is_where_the_float64_cdf_crosses_the_uniform(
    V: int, temperature: float, offset: float, dtype: torch.dtype
) -> None:
    R = 20 if V > 1000 else 63
    logits = guarded((3 * torch.randn(R, V) + offset).to(dtype))
    uniform = guarded(torch.cat([EDGES, torch.rand(R - len(EDGES))]))
    drawn = draw(logits, uniform, temperature=temperature)
    assert_draws(logits, uniform, drawn, temperature=temperature)
    assert drawn[2].eq(0).all()
    p, _, _ = truth(logits, temperature=temperature)
    expected = torch.searchsorted(p.cumsum(1), uniform.double()[:, None], right=True).squeeze(1)
    assert (drawn[0] != expected)[2:].float().mean() <= 0.02  # rounding at a boundary of the CDF


@settings(max_examples=60, suppress_health_check=UNRESET)
@given(
    V=st.sampled_from([1, 2, 64, 127, 300, 5000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    temperature=st.sampled_from([1.0, 0.6]),
    top_k=st.sampled_from([0, 1, 3, 50, 700]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 1e-9]),
    scale=st.sampled_from([0.3, 3.0]),
    masked=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 99),
)
def test_truncated_draws_answer_to_a_full_sort(
    isa: str,
    V: int,
    dtype: torch.dtype,
    temperature: float,
    top_k: int,
    top_p: float,
    scale: float,
    masked: float,
    seed: int,
) -> None:
    """Flat and peaked rows, with columns at -inf; bfloat16 logits have many ties."""
    torch.manual_seed(seed)
    logits = (scale * torch.randn(12, V)).to(dtype)
    logits[:, 1:][torch.rand(12, V - 1) < masked] = -torch.inf
    truncation = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    uniform = torch.rand(12)
    drawn = draw(guarded(logits), uniform, **truncation)
    p, before, rank = truth(logits, **truncation)
    if top_p < 1 and (before - top_p).abs().min() < 1e-6:
        return  # a sum so close to top_p that rounding decides whether one column more is kept
    assert_draws(logits, uniform, drawn, **truncation)


@pytest.mark.parametrize("tied", [5, 40, 3000])
@pytest.mark.parametrize("top", [{"top_k": 3}, {"top_p": 0.5}, {"top_k": 4, "top_p": 0.5}])
def test_of_equal_logits_the_first_columns_are_kept(tied: int, top: dict[str, Any]) -> None:
    """`tied` columns share the largest logit; which of them survive is part of the definition."""
    logits = -15 - torch.rand(1, 4000)
    columns = torch.randperm(4000)[:tied].sort().values
    logits[0, columns] = 0.0
    kept = min(top.get("top_k", tied), tied)
    total = kept if "top_k" in top else float(logits.double().exp().sum())
    kept = math.ceil(top.get("top_p", 1.0) * total) if "top_p" in top else kept
    assert kept <= tied
    uniform = (torch.arange(kept) + 0.5) / kept
    tokens, logprobs, _ = draw(logits.expand(kept, -1), uniform, **top)
    assert torch.equal(tokens, columns[:kept]) and torch.allclose(logprobs, torch.tensor(-math.log(kept)))


@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_frequencies_are_the_probabilities(temperature: float, truncation: dict[str, Any]) -> None:
    """Chi-square of 40,000 draws over 20 tokens: at most 19 degrees of freedom, 0.1 % point 43.8."""
    logits = torch.randn(1, 20)
    tokens, _, _ = draw(logits.expand(40_000, -1), torch.rand(40_000), temperature=temperature, **truncation)
    counts = tokens.bincount(minlength=20).double()

    def chi_square(scale: float) -> Tensor:
        p = truth(scale * logits, temperature=temperature, **truncation)[0][0]
        squares = (counts - 40_000 * p).square()
        return torch.where(squares > 0, squares / (40_000 * p), 0).sum()  # infinite if what cannot be was drawn

    assert chi_square(1.0) < 43.8 < chi_square(1.1)  # a temperature 10 % off is seen


@DTYPES
@pytest.mark.parametrize("V", [6, 300, 1000])
@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_a_token_of_probability_zero_is_never_drawn(
    isa: str, V: int, truncation: dict[str, Any], dtype: torch.dtype
) -> None:
    """-inf, the dtype's most negative number and an underflow, for u at both ends and beyond what rounding allows."""
    logits = torch.full((7, V), -math.inf, dtype=dtype)
    logits[:, [1, 2, 4]] = torch.tensor([0.0, 1.0, 0.5], dtype=dtype)
    logits[:, 3], logits[:, V - 1], logits[:, 0] = -1e30, torch.finfo(dtype).min, -200.0
    uniform = torch.cat([EDGES.double(), torch.tensor([1.0 - 1e-16, 1.0, 1.0 + 1e-6]).double()])
    tokens, logprobs, log_mass = draw(logits, uniform, **truncation)
    assert {1, 2, 4} >= set(tokens.tolist()) and logprobs.isfinite().all() and log_mass.isfinite().all()
    one_hot = torch.full((7, V), -math.inf, dtype=dtype)
    one_hot[:, V - 2] = 3.0
    tokens, logprobs, log_mass = draw(one_hot, uniform, **truncation)
    assert tokens.eq(V - 2).all() and logprobs.eq(0).all() and log_mass.eq(0).all()


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("V", [1, 64, 700])
@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_a_row_that_is_no_distribution_gives_a_token_in_range_and_nan(
    isa: str, rubbish: float, V: int, truncation: dict[str, Any]
) -> None:
    logits = torch.randn(4, V)
    expected = draw(logits, EDGES, **truncation)
    logits[1] = rubbish
    if rubbish != -math.inf:
        logits[2, V - 1] = rubbish
    tokens, logprobs, log_mass = draw(logits, EDGES, **truncation)
    bad = [1] if rubbish == -math.inf else [1, 2]
    good = [i for i in range(4) if i not in bad]
    assert (tokens >= 0).all() and (tokens < V).all()
    assert logprobs[bad].isnan().all() and log_mass[bad].isnan().all()
    assert all(torch.equal(a[good], e[good]) for a, e in zip((tokens, logprobs, log_mass), expected, strict=True))


@DTYPES
@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_a_row_does_not_depend_on_the_others(isa: str, truncation: dict[str, Any], dtype: torch.dtype) -> None:
    """The same bits again, in another order, alone, and with rows further apart than V."""
    logits, uniform, order = (2 * torch.randn(40, 1003)).to(dtype), torch.rand(40), torch.randperm(40)
    drawn = draw(logits, uniform, **truncation)
    again, shuffled = draw(logits, uniform, **truncation), draw(logits[order], uniform[order], **truncation)
    alone = [draw(logits[i : i + 1], uniform[i : i + 1], **truncation) for i in range(40)]
    wide = torch.full((40, 1010), 99.0, dtype=dtype)
    wide[:, 3:1006] = logits
    strided = draw(wide[:, 3:1006], torch.stack([uniform, uniform], 1)[:, 0], **truncation)
    transposed = draw(logits.T.contiguous().T, uniform, **truncation)
    for i, x in enumerate(drawn):
        assert torch.equal(x, again[i]) and torch.equal(x[order], shuffled[i])
        assert torch.equal(x, torch.cat([a[i] for a in alone]))
        assert torch.equal(x, strided[i]) and torch.equal(x, transposed[i])


@DTYPES
@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_threads_change_no_bit(truncation: dict[str, Any], dtype: torch.dtype) -> None:
    """Forty pieces of work: every thread draws many rows in the same scratch."""
    logits, uniform = (2 * torch.randn(40, 1 << 16)).to(dtype), torch.rand(40)
    assert_same_bits(on_threads(lambda: draw(logits, uniform, **truncation)))


def test_the_work_is_shared() -> None:
    """Each thread has a line of scratch of its own; a thread may come too late for any work, but not every time."""
    logits, uniform, library = torch.randn(64, 1 << 16), torch.rand(64).double(), _library()
    out = [torch.empty(64, dtype=torch.int64), torch.empty(64), torch.empty(64)]
    for _ in range(100):
        scratch = torch.zeros(2, library.fastppo_sample_scratch(1 << 16, 0, 1.0), dtype=torch.float64)
        given, pointers = (logits.data_ptr(), 1 << 16, uniform.data_ptr()), [x.data_ptr() for x in (*out, scratch)]
        library.fastppo_sample(64, 1 << 16, 0, *given, 1.0, 0, 1.0, *pointers, 0, 2)
        if scratch.count_nonzero(1).all():
            return
    raise AssertionError("the second thread never drew a row")


@DTYPES
@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_a_fused_multiply_add_is_all_that_tells_instruction_sets_apart(
    truncation: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, uniform = (2 * torch.randn(40, 1003)).to(dtype), torch.rand(40)
    made = on_every_isa(monkeypatch, lambda: draw(logits, uniform, **truncation))
    rounded_twice = made.pop("portable")
    if made:
        assert_same_bits(made.values())
    for drawn in made.values():
        assert torch.equal(drawn[0], rounded_twice[0]) and torch.allclose(drawn[1], rounded_twice[1], atol=1e-6)


def test_log_probs_have_the_digits_of_float32(isa: str) -> None:
    """Two columns 0 to 1 nats apart, so that an error of the exponential is an error of the log-prob."""
    logits = torch.stack([torch.zeros(2000), -torch.linspace(0, 1, 2000)], 1)
    tokens, logprobs, _ = draw(logits, torch.rand(2000))
    baseline, exact = (x.log_softmax(1).gather(1, tokens[:, None]).squeeze(1) for x in (logits, logits.double()))
    assert_as_accurate("logprobs", logprobs, baseline, exact)


def test_a_constant_added_to_a_row_costs_no_accuracy(isa: str) -> None:
    """Logits on a grid that +-1e4 leaves exact: the very same draws."""
    logits, uniform = torch.randint(-40, 40, (50, 999)) / 8, torch.rand(50)
    expected = draw(logits, uniform, temperature=0.6)
    for offset in (1e4, -1e4):
        assert all(
            torch.equal(a, e) for a, e in zip(draw(logits + offset, uniform, temperature=0.6), expected, strict=True)
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_uniforms_of_half_a_width_are_taken_as_they_are(dtype: torch.dtype) -> None:
    logits, uniform = torch.randn(50, 300), torch.rand(50).mul(0.99).to(dtype)
    assert_same_bits([draw(logits, uniform), draw(logits, uniform.double())])


def test_float64_uniforms_are_not_rounded() -> None:
    """One over the other side of a boundary that float32 cannot tell apart from it."""
    logits, boundary = torch.tensor([[math.log(1.0), math.log(2.0)]]), 1 / 3
    for offset, token in ((-1e-9, 0), (1e-7, 1)):
        assert draw(logits, torch.tensor([boundary + offset], dtype=torch.float64))[0].item() == token


@pytest.mark.parametrize("temperature", [1e-45, 1e-8, 1e8])
def test_extreme_temperatures(isa: str, temperature: float) -> None:
    """Towards 0 it is greedy, towards infinity uniform; nothing overflows on the way."""
    logits = torch.linspace(-1, 2, 4).expand(400, 4)
    tokens, logprobs, _ = draw(logits, torch.linspace(0, 1, 401)[:-1], temperature=temperature)
    expected = [400] if temperature < 1 else [100, 100, 100, 100]
    assert tokens.bincount()[-len(expected) :].tolist() == expected
    assert torch.allclose(logprobs, torch.tensor(0.0 if temperature < 1 else -math.log(4)))


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_the_public_op_draws_the_same(truncation: dict[str, Any]) -> None:
    logits, uniform = 2 * torch.randn(300, 200), torch.rand(300)
    tokens, logprobs, _ = draw(logits, uniform, **truncation)
    expected, expected_logprobs = public_sample(logits, uniform, **truncation)[:2]
    assert (tokens != expected).float().mean() <= 0.01
    same = tokens == expected
    assert torch.allclose(logprobs[same], expected_logprobs[same], atol=1e-5)


def test_empty_batches_and_what_does_not_fit() -> None:
    assert [len(x) for x in draw(torch.zeros(0, 10), torch.zeros(0))] == [0, 0, 0]
    for logits, uniform in ((torch.zeros(1, 2).half(), EDGES), (torch.zeros(1, 2), EDGES.long())):
        with pytest.raises(ValueError, match="logits must be float32 or bfloat16 and uniform a float tensor, got"):
            draw(logits, uniform)
