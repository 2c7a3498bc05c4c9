"""Laws of the PPO objective: ratio, clips, statistics, weights."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastppo_kernels import linear_ppo_loss, logits_ppo_loss, merge_stats, ppo_loss, token_logprobs
from fastppo_kernels.backend import available
from numerics import DEVICE
from ppo_rows import SETTINGS, by_hand, head_inputs, row_inputs, vector


@settings(max_examples=40)
@given(kwargs=SETTINGS, seed=st.integers(0, 99))
def test_loss_is_the_formula(kwargs: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    logprobs, entropy = -torch.rand(12).double() * 3, torch.rand(12).double()
    rows = row_inputs(logprobs)
    loss, stats = ppo_loss(logprobs, entropy=entropy, **rows, **kwargs)
    each = [
        by_hand(float(logprobs[i]), {k: float(x[i]) for k, x in rows.items()}, kwargs, float(entropy[i]))
        for i in range(12)
    ]
    assert float(loss) == pytest.approx(sum(each), rel=1e-10, abs=1e-12)
    live = rows["weights"] != 0
    assert stats["token_count"] == live.sum()
    assert stats["entropy_sum"].item() == pytest.approx(float(entropy[live].sum()))


def test_statistics_of_four_rows_by_hand() -> None:
    """One row clipped below, one above, one bounded by the dual clip, one free; one dead row full of rubbish."""
    ratio = vector(0.5, 1.5, 4.0, 1.1, math.nan)
    logprobs, A = vector(-1, -2, -3, -4, math.nan), vector(-1, 1, -2, 3, math.inf)
    w, ref = vector(0.5, 1, 2, 3, 0), vector(-1.5, -2, -3.5, -4, math.nan)
    loss, stats = ppo_loss(
        logprobs, logprobs - ratio.log(), A, w, ref_logprobs=ref, kl_coef=0.1, kl_estimator="k1", dual_clip=3.0
    )
    expected = {
        "token_count": 4,
        "policy_loss_sum": 0.5 * 0.8 + 1 * -1.2 + 2 * 6 + 3 * -3.3,
        "kl_loss_sum": 0.1 * (0.5 * 0.5 + 2 * 0.5),
        "clip_count": 2,
        "clip_low_count": 1,
        "clip_high_count": 1,
        "dual_clip_count": 1,
        "ratio_sum": 7.1,
        "ratio_sq_sum": 0.25 + 2.25 + 16 + 1.21,
        "ratio_max": 4.0,
        "old_k1_sum": -sum(math.log(x) for x in (0.5, 1.5, 4, 1.1)),
        "old_k2_sum": sum(math.log(x) ** 2 / 2 for x in (0.5, 1.5, 4, 1.1)),
        "old_k3_sum": sum(x - 1 - math.log(x) for x in (0.5, 1.5, 4, 1.1)),
        "logprob_sum": -10,
        "ref_k1_sum": 1.0,
        "ref_k2_sum": 0.25,
        "ref_k3_sum": 2 * (math.exp(-0.5) - 0.5),
    }
    assert set(stats) == set(expected)
    for key, value in expected.items():
        assert stats[key].item() == pytest.approx(value, rel=1e-12), key
        assert stats[key].dtype == torch.float64 and stats[key].shape == ()
    assert loss.item() == pytest.approx(expected["policy_loss_sum"] + expected["kl_loss_sum"])


def test_ratio_is_one_and_gradient_is_reinforce_before_the_first_update() -> None:
    """logits [1, 2, 1, 1], action 1, advantage 1: ascent direction [-.1749, .5246, -.1749, -.1749], nothing clipped."""
    logits = vector(1, 2, 1, 1)[None].requires_grad_()
    old = logits.detach().log_softmax(-1)[:, 1]
    ascent = vector(-0.1749, 0.5246, -0.1749, -0.1749)
    for old_logprobs in (old, None):
        loss, stats = logits_ppo_loss(logits, torch.tensor([1]), old_logprobs, vector(1), vector(1), inplace=False)
        assert torch.allclose(-torch.autograd.grad(loss, logits)[0], ascent[None], atol=1e-4)
        assert loss == -1 and stats["ratio_sum"] == 1 and stats["clip_count"] == 0 and stats["old_k3_sum"] == 0


def test_old_log_probs_scored_in_the_same_calls_give_ratio_one_exactly() -> None:
    hidden, weight, _, targets = head_inputs(37, 16, 301, torch.float32)
    old = token_logprobs(hidden, weight, targets, temperature=0.6, chunk_size=8)
    ones = torch.ones(37)
    _, stats = linear_ppo_loss(hidden, weight, targets, old, ones, ones, temperature=0.6, chunk_size=8)
    assert stats["ratio_max"] == 1 and stats["ratio_sum"] == 37 and stats["clip_count"] == 0


def test_no_old_log_probs_means_the_policy_itself() -> None:
    logprobs = torch.randn(9).double().requires_grad_()
    rows = row_inputs(logprobs)
    rows["old_logprobs"] = logprobs.detach()
    given_, _ = ppo_loss(logprobs, **rows)
    rows["old_logprobs"] = None
    absent, _ = ppo_loss(logprobs, **rows)
    assert torch.equal(given_, absent)
    assert torch.equal(torch.autograd.grad(given_, logprobs)[0], torch.autograd.grad(absent, logprobs)[0])


def test_infinite_clips_are_the_plain_importance_weighted_objective() -> None:
    logprobs = torch.randn(20).double().requires_grad_()
    rows = row_inputs(logprobs)
    rows["old_logprobs"] = logprobs.detach() + torch.randn(20)
    loss, stats = ppo_loss(logprobs, **rows, clip_low=math.inf, clip_high=math.inf)
    ratio = (logprobs - rows["old_logprobs"]).exp()
    plain = -(rows["weights"] * rows["is_weights"] * rows["advantages"] * ratio).sum()
    assert torch.allclose(loss, plain) and stats["clip_count"] == 0
    assert torch.allclose(torch.autograd.grad(loss, logprobs)[0], torch.autograd.grad(plain, logprobs)[0])


def test_dual_clip_bounds_the_loss_of_negative_advantages_only() -> None:
    log_ratio = torch.linspace(-3, 3, 41).double().requires_grad_()
    zeros, ones = torch.zeros(41).double(), torch.ones(41).double()
    for A in (-2.0, 2.0):
        free = torch.stack([ppo_loss(x[None], zeros[:1], A * ones[:1], ones[:1])[0] for x in log_ratio])
        dual = torch.stack([ppo_loss(x[None], zeros[:1], A * ones[:1], ones[:1], dual_clip=3.0)[0] for x in log_ratio])
        assert torch.equal(dual, free if A > 0 else free.clamp(max=6.0))
    (grad,) = torch.autograd.grad(ppo_loss(log_ratio, zeros, -2 * ones, ones, dual_clip=3.0)[0], log_ratio)
    assert grad[log_ratio > math.log(3)].eq(0).all()
    assert grad[(log_ratio > math.log(0.8)) & (log_ratio < math.log(3))].gt(0).all()


def test_old_kl_penalty_is_unbiased_for_kl_of_old_to_new() -> None:
    logits, old = torch.randn(6).double().requires_grad_(), torch.randn(6).double().log_softmax(0)
    logp = logits.log_softmax(0)
    loss, stats = ppo_loss(logp, old, torch.zeros(6).double(), old.exp(), old_kl_coef=1.0)
    kl = (old.exp() * (old - logp)).sum()
    assert torch.allclose(loss, kl) and stats["policy_loss_sum"] == 0
    made, wanted = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, kl))
    assert torch.allclose(made, wanted)


@pytest.mark.parametrize("x", [30.0, -30.0, 200.0])
def test_exponent_is_bounded_and_the_reported_kl_is_not(x: float) -> None:
    logprobs = torch.tensor([x], requires_grad=True)
    zero, one = torch.zeros(1), torch.ones(1)
    loss, stats = ppo_loss(logprobs, zero, one, one, clip_low=math.inf, clip_high=math.inf)
    bound = math.copysign(20, x)
    assert loss.item() == pytest.approx(-math.exp(bound), rel=1e-5)
    assert torch.autograd.grad(loss, logprobs)[0] == 0
    assert stats["old_k1_sum"] == -x and stats["old_k2_sum"] == x * x / 2
    assert stats["old_k3_sum"].item() == pytest.approx(math.exp(bound) - 1 - x, rel=1e-5)


@pytest.mark.parametrize("x", [25.0, -25.0])
@pytest.mark.parametrize("which", ["reference", "old"])
def test_penalty_pulls_back_from_beyond_the_bound(x: float, which: str) -> None:
    logprobs, zero, one = torch.tensor([x], requires_grad=True), torch.zeros(1), torch.ones(1)
    extra: dict[str, Any] = {"kl_coef": 1.0, "ref_logprobs": zero} if which == "reference" else {"old_kl_coef": 1.0}
    loss, _ = ppo_loss(logprobs, zero if which == "old" else None, zero, one, **extra)
    assert torch.sign(torch.autograd.grad(loss, logprobs)[0]) == math.copysign(1, x)


def test_importance_weights_make_the_sampler_s_gradient_on_policy() -> None:
    """Three tokens, exact expectations: E over the sampler of (p_old / p_sampler) grad = E over p_old of grad."""
    logits, A = vector(0.3, -0.5, 0.1).requires_grad_(), vector(1.0, -2.0, 0.5)
    sampler = (logits.detach() + vector(0.5, -0.7, 0.2)).softmax(0)
    logp = logits.log_softmax(0)
    old = logp.detach()
    is_weights = (old.exp() / sampler).requires_grad_()
    on_policy, _ = ppo_loss(logp, old, A, old.exp())
    corrected, _ = ppo_loss(logp, old, A, sampler, is_weights=is_weights)
    wrong, _ = ppo_loss(logp, old, A, sampler)
    target, made, biased = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (on_policy, corrected, wrong))
    assert torch.allclose(made, target, atol=1e-14) and not torch.allclose(biased, target, atol=1e-2)
    assert torch.autograd.grad(corrected, is_weights, allow_unused=True) == (None,)


def test_importance_weights_leave_the_penalties_alone() -> None:
    logprobs = torch.randn(5).double()
    rows = row_inputs(logprobs, dead=0)
    rows["is_weights"] = torch.zeros(5).double()
    loss, stats = ppo_loss(logprobs, **rows, kl_coef=0.5, entropy=torch.ones(5), entropy_coef=0.1)
    assert stats["policy_loss_sum"] == 0 and stats["kl_loss_sum"] > 0
    assert torch.allclose(loss, stats["kl_loss_sum"] - 0.1 * rows["weights"].sum())


def test_aggregations_are_weight_vectors() -> None:
    """Lengths 1 and 3 with advantages +1 and -1 at ratio 1; each mode's closed form, and no batching changes it."""
    logprobs, lengths = torch.zeros(4).double().requires_grad_(), torch.tensor([1, 3, 3, 3])
    A = vector(1, -1, -1, -1)
    modes = {
        "token mean": (torch.full((4,), 1 / 4).double(), 0.5),
        "sequence mean of token sums": (torch.full((4,), 1 / 2).double(), 1.0),
        "sequence mean of token means": (1 / (2 * lengths.double()), 0.0),
        "constant divisor 8": (torch.full((4,), 1 / 8).double(), 0.25),
    }
    for name, (weights, expected) in modes.items():
        loss, _ = ppo_loss(logprobs, None, A, weights)
        assert loss.item() == pytest.approx(expected, abs=1e-15), name
        (whole,) = torch.autograd.grad(loss, logprobs)
        assert whole.sum().item() == pytest.approx(expected, abs=1e-15), name
        parts = [ppo_loss(logprobs[s], None, A[s], weights[s])[0] for s in (slice(0, 1), slice(1, 4))]
        assert torch.equal(torch.autograd.grad(torch.stack(parts).sum(), logprobs)[0], whole), name


@pytest.mark.parametrize("backend", available(torch.zeros(1, device=DEVICE)))
def test_a_nan_log_prob_is_not_hidden(backend: str) -> None:
    """Neither in the loss nor in the gradient, whose other rows are what they are without it."""
    logprobs = torch.tensor([math.nan, -1.0], device=DEVICE, requires_grad=True)
    old, ones = torch.tensor([-1.0, -1.2], device=DEVICE), torch.ones(2, device=DEVICE)
    loss, _ = ppo_loss(logprobs, old, -ones, ones, backend=backend)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert loss.isnan() and gradient[0].isnan() and gradient[1].item() == pytest.approx(math.exp(0.2), rel=1e-6)


@settings(max_examples=10)
@given(cuts=st.lists(st.integers(0, 20), max_size=4), kwargs=SETTINGS, seed=st.integers(0, 99))
def test_loss_gradient_and_statistics_add_up_over_any_split(cuts: list[int], kwargs: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    hidden, weight, bias, targets = head_inputs(20, 4, 11, torch.float64)
    rows = row_inputs(token_logprobs(hidden, weight, targets, bias=bias))
    weight.requires_grad_()

    def run(s: slice) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        some = {k: x[s] for k, x in rows.items()}
        loss, stats = linear_ppo_loss(hidden[s], weight, targets[s], bias=bias, with_entropy=True, **some, **kwargs)
        return loss, torch.autograd.grad(loss, weight)[0], stats

    edges = sorted([0, *cuts, 20])
    parts = [run(slice(a, b)) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    loss, gradient, stats = run(slice(0, 20))
    assert torch.allclose(torch.stack([p[0] for p in parts]).sum(), loss)
    assert torch.allclose(torch.stack([p[1] for p in parts]).sum(0), gradient)
    merged = merge_stats(p[2] for p in parts)
    assert set(merged) == set(stats)
    for key in stats:
        assert torch.allclose(merged[key], stats[key]), key


def test_statistics_that_nobody_can_add_are_refused() -> None:
    with pytest.raises(ValueError, match="must end in _sum, _count or _max, got 'ratio_mean'"):
        merge_stats([{"ratio_mean": torch.zeros(())}])
    assert merge_stats([]) == {}
