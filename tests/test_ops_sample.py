"""Laws of sample."""

import math
from typing import Any

import pytest
import torch

from fastppo_kernels import logits_token_logprobs, reference, sample
from numerics import DEVICE

EDGES = torch.tensor([0.0, 1.0 - 2**-24, 0.5, 2**-24])  # the first and the last float32 of [0, 1) among them


@pytest.mark.parametrize("V", [1, 5, 127, 128, 129, 1000, 16384])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_token_is_where_the_float64_cdf_crosses_the_uniform(V: int, temperature: float) -> None:
    logits = (3 * torch.randn(200, V)).to(DEVICE)
    uniform = torch.rand(200).to(DEVICE)
    uniform[: len(EDGES)] = EDGES
    tokens, logprobs = sample(logits, uniform, temperature=temperature)
    assert tokens.dtype == torch.int64 and logprobs.dtype == torch.float32
    p = (logits.double() / temperature).softmax(1)
    end = p.cumsum(1).gather(1, tokens[:, None]).squeeze(1)
    mass = p.gather(1, tokens[:, None]).squeeze(1)
    assert (uniform < end + 1e-6).all() and (uniform >= end - mass - 1e-6).all()
    truth, _ = reference.sample(logits.double(), uniform, temperature=temperature, top_k=0, top_p=1.0)
    assert (tokens != truth).float().mean() <= 0.01  # rounding at a boundary of the CDF
    assert torch.allclose(logprobs.double(), mass.log(), atol=1e-5)


def test_frequencies_are_the_probabilities() -> None:
    """Chi-square of 40,000 draws over 20 tokens: 19 degrees of freedom, 0.1 % point 43.8."""
    logits = torch.randn(20)
    tokens, _ = sample(logits.expand(40_000, -1), torch.rand(40_000))
    expected = 40_000 * logits.softmax(0)
    chi_square = (tokens.bincount(minlength=20) - expected).square().div(expected).sum()
    assert chi_square < 43.8
    wrong = 40_000 * (1.1 * logits).softmax(0)
    assert (tokens.bincount(minlength=20) - wrong).square().div(wrong).sum() > 43.8  # so the test can fail


@pytest.mark.parametrize("V", [6, 300])
@pytest.mark.parametrize("truncation", [{}, {"top_k": 2}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.6}])
def test_a_token_of_probability_zero_is_never_drawn(V: int, truncation: dict[str, Any]) -> None:
    """-inf columns and columns that underflow, at both ends and in the middle, for u at both ends."""
    logits = torch.full((len(EDGES), V), -math.inf)
    logits[:, [1, 2, 4]] = torch.tensor([0.0, 1.0, 0.5])
    logits[:, 3] = -1e30
    for u in EDGES:
        tokens, logprobs = sample(logits, u.expand(len(EDGES)), **truncation)
        assert all(int(t) in (1, 2, 4) for t in tokens) and logprobs.isfinite().all()
    one_hot = torch.full((len(EDGES), V), -math.inf)
    one_hot[:, V - 2] = 3.0
    tokens, logprobs = sample(one_hot, EDGES, **truncation)
    assert tokens.eq(V - 2).all() and logprobs.eq(0).all()


def test_rounding_of_partial_sums_cannot_reach_a_token_of_probability_zero() -> None:
    """Uniforms so close to the mass of columns 0 to 99 that float32 and float64 sums disagree on their side."""
    logits = torch.full((50, 256), -math.inf)
    logits[:, :100], logits[:, 200] = torch.randn(50, 100), 4.0
    mass = logits.double().softmax(1)[:, :100].sum(1)
    for offset in torch.linspace(-2e-7, 2e-7, 200).double():
        tokens, logprobs = sample(logits, mass + offset)
        assert logprobs.isfinite().all() and ((tokens < 100) | (tokens == 200)).all()


def test_log_probs_are_those_the_scorer_gives() -> None:
    logits = 4 * torch.randn(50, 999)
    tokens, logprobs = sample(logits, torch.rand(50), temperature=0.6)
    scored = logits_token_logprobs(logits, tokens, temperature=0.6)
    assert torch.allclose(logprobs, scored, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 3, 8, 500])
@pytest.mark.parametrize("top_p", [1.0, 0.7, 1e-9])
def test_truncation_renormalises(top_k: int, top_p: float) -> None:
    """Every token drawn is in the truncated set, every likely token of it is drawn, as often as its log-prob says."""
    logits = torch.randn(40).mul(2)
    uniform = torch.linspace(0, 1, 3001)[:-1]
    tokens, logprobs = sample(logits.expand(3000, -1), uniform, top_k=top_k, top_p=top_p)
    ranked = logits.double().sort(descending=True).indices[:top_k]
    p = logits.double()[ranked].softmax(0)
    kept = ranked[p.cumsum(0) - p < top_p]
    p = logits.double()[kept].softmax(0)
    assert set(kept[p > 1e-3].tolist()) <= set(tokens.tolist()) <= set(kept.tolist())
    for token, probability in zip(kept, p, strict=True):
        assert torch.allclose(logprobs[tokens == token].double(), probability.log(), atol=1e-5)
        assert (tokens == token).double().mean().item() == pytest.approx(probability.item(), abs=1e-3)


@pytest.mark.parametrize("truncation", [{"top_k": 7}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.8}])
def test_truncated_draws_follow_the_order_of_the_vocabulary(truncation: dict[str, Any]) -> None:
    """Which token a uniform draws is part of the definition, so every implementation draws the same."""
    logits, uniform = 2 * torch.randn(300, 50).double(), torch.rand(300).double()
    arguments = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | truncation
    tokens, logprobs = sample(logits, uniform, **arguments)
    expected, expected_logprobs = reference.sample(logits, uniform, **arguments)
    assert torch.equal(tokens, expected) and torch.allclose(logprobs, expected_logprobs)


def test_top_k_one_is_greedy() -> None:
    logits = torch.randn(30, 500)
    tokens, logprobs = sample(logits, torch.rand(30), top_k=1)
    assert torch.equal(tokens, logits.argmax(1)) and logprobs.eq(0).all()


def test_the_same_uniform_draws_the_same_token() -> None:
    logits, uniform = torch.randn(8, 1000), torch.rand(8)
    first = sample(logits, uniform)
    alone = torch.cat([sample(logits[i : i + 1], uniform[i : i + 1])[0] for i in range(8)])
    assert torch.equal(first[0], sample(logits, uniform)[0]) and torch.equal(first[0], alone)


def test_bfloat16_logits_and_empty_batches() -> None:
    logits = torch.randn(4, 300).bfloat16()
    tokens, logprobs = sample(logits, torch.rand(4))
    assert logprobs.dtype == torch.float32
    assert torch.allclose(logprobs.double(), logits.double().log_softmax(1)[torch.arange(4), tokens], atol=1e-5)
    tokens, logprobs = sample(torch.zeros(0, 10), torch.zeros(0))
    assert tokens.shape == logprobs.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0; for greedy decoding pass top_k=1"),
        ({"top_p": 0.0}, r"top_p in \(0, 1\]"),
        ({"top_k": -1}, "top_k must be >= 0"),
        ({"uniform": torch.zeros(3)}, r"uniform must have shape \(R,\) = \(2,\)"),
        ({"logits": torch.zeros(2)}, r"logits must be \(R, V\)"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"logits": torch.zeros(2, 4), "uniform": torch.zeros(2)}
    with pytest.raises(ValueError, match=message):
        sample(**(arguments | change))
