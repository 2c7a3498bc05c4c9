"""Laws of ppo_loss, logits_ppo_loss and linear_ppo_loss."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastppo_kernels import linear_ppo_loss, logits_ppo_loss, merge_stats, ppo_loss, token_logprobs, token_rewards
from fastppo_kernels.reference import PPORows, kl_estimates
from fastppo_kernels.reference import ppo_loss as reference_ppo_loss
from fastppo_kernels.reference import token_logprobs as reference_token_logprobs
from fastppo_kernels.settings import HeadSettings, PPOSettings
from numerics import DEVICE, assert_as_accurate

SETTINGS = st.fixed_dictionaries(
    {
        "clip_low": st.sampled_from([0.2, 0.0, math.inf]),
        "clip_high": st.sampled_from([0.2, 0.28, math.inf]),
        "dual_clip": st.sampled_from([None, 1.5]),
        "kl_coef": st.sampled_from([0.0, 0.3]),
        "kl_estimator": st.sampled_from(["k1", "k2", "k3", "k1+", "k3+"]),
        "entropy_coef": st.sampled_from([0.0, 0.1]),
        "old_kl_coef": st.sampled_from([0.0, 0.2]),
    }
)
HEAD = st.fixed_dictionaries({"temperature": st.sampled_from([1.0, 0.7]), "softcap": st.sampled_from([None, 4.0])})


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device=DEVICE)


def row_inputs(logprobs: Tensor, *, dead: float = 0.3) -> dict[str, Any]:
    """Constants of the rows: ratios on both sides of every clip, a few dead rows, advantages of both signs."""
    R, like = logprobs.shape[0], {"dtype": logprobs.dtype, "device": logprobs.device}
    weights = torch.rand(R, **like) + 0.1
    return {
        "old_logprobs": logprobs.detach() + 0.4 * torch.randn(R, **like),
        "advantages": torch.randn(R, **like),
        "weights": torch.where(torch.rand(R, **like) < dead, 0, weights),
        "ref_logprobs": logprobs.detach() + 0.5 * torch.randn(R, **like),
        "is_weights": torch.rand(R, **like) * 2,
    }


def head_inputs(R: int, H: int, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = torch.randn(R, H, device=DEVICE).to(dtype)
    weight = (2 * torch.randn(V, H, device=DEVICE) / math.sqrt(H)).to(dtype)
    return hidden, weight, torch.randn(V, device=DEVICE).to(dtype), torch.randint(V, (R,), device=DEVICE)


def reference_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: dict[str, Any], **kwargs: Any
) -> Any:
    head = HeadSettings(temperature=kwargs.pop("temperature", 1.0), softcap=kwargs.pop("softcap", None))
    logprobs, entropy = reference_token_logprobs(hidden, weight, targets, head, bias=bias)
    return reference_ppo_loss(logprobs, PPORows(**rows), PPOSettings(**kwargs), entropy)


def by_hand(logp: float, row: dict[str, float], s: dict[str, Any], entropy: float) -> float:
    """Loss of one row in plain Python."""
    x = logp - row["old_logprobs"]
    r, A, d = math.exp(x), row["advantages"], logp - row["ref_logprobs"]
    clipped = min(max(r, 1 - s["clip_low"]), 1 + s["clip_high"])
    surrogate = max(-A * r, -A * clipped)
    if s["dual_clip"] is not None and A < 0:
        surrogate = min(surrogate, -s["dual_clip"] * A)
    kl = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[s["kl_estimator"].rstrip("+")]
    rest = s["kl_coef"] * kl + s["old_kl_coef"] * (r - 1 - x) - s["entropy_coef"] * entropy
    return row["weights"] * (row["is_weights"] * surrogate + rest)


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


REF, REWARD, BETA = (0.4, 0.3, 0.2, 0.1), (0.6, 0.0, 1.0, 0.2), 0.5


def toy_optimum(expected_loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Policy on 4 actions after exact-gradient descent from the reference.

    `expected_loss(log-probs, probabilities)` sums over all actions with the (constant) policy as weights: the
    expectation that a sampled batch estimates.
    """
    logits = vector(*REF).log().requires_grad_()
    for _ in range(800):
        logp = logits.log_softmax(0)
        (grad,) = torch.autograd.grad(expected_loss(logp, logp.detach().exp()), logits)
        logits = (logits - 3.0 * grad).detach().requires_grad_()
    return logits.detach().softmax(0)


def as_loss(estimator: str) -> Callable[[Tensor, Tensor], Tensor]:
    def expected_loss(logp: Tensor, p: Tensor) -> Tensor:
        ref = vector(*REF).log()
        return ppo_loss(logp, None, vector(*REWARD), p, ref_logprobs=ref, kl_coef=BETA, kl_estimator=estimator)[0]

    return expected_loss


def as_reward(logp: Tensor, p: Tensor) -> Tensor:
    cu = torch.arange(5, dtype=torch.int32, device=DEVICE)
    advantages = token_rewards(vector(*REWARD), logp, vector(*REF).log(), cu, kl_coef=BETA)
    return ppo_loss(logp, None, advantages, p)[0]


def kl(p: Tensor, q: Tensor) -> float:
    return float((p * (p.log() - q.log())).sum())


OPTIMUM = (vector(*REF).log() + vector(*REWARD) / BETA).softmax(0)  # ref * exp(reward / beta), normalised


@pytest.mark.parametrize(
    "objective",
    [as_reward, as_loss("k2"), as_loss("k1+"), as_loss("k3+")],
    ids=["k1 in the reward", "k2", "k1+", "k3+"],
)
def test_penalties_with_the_gradient_of_kl_reach_the_optimum(objective: Any) -> None:
    assert kl(toy_optimum(objective), OPTIMUM) < 1e-12


def test_k3_as_a_loss_stalls_where_the_forward_kl_balances_the_reward() -> None:
    """Its gradient is that of KL(ref || policy), so it stops at p (r - E r) + beta (ref - p) = 0, off the optimum."""
    p, r = toy_optimum(as_loss("k3")), vector(*REWARD)
    assert torch.allclose(p * (r - p @ r) + BETA * (vector(*REF) - p), torch.zeros(4).double(), atol=1e-9)
    assert kl(p, OPTIMUM) > 1e-2


def test_k1_as_a_loss_is_no_penalty_at_all() -> None:
    """Its expected gradient is 0, so the policy collapses onto the best action as if beta were 0."""
    p = toy_optimum(as_loss("k1"))
    best = int(vector(*REWARD).argmax())
    assert p[best] > 0.99
    assert kl(p, OPTIMUM) == pytest.approx(-math.log(OPTIMUM[best]), rel=0.05)


def test_expected_gradients_of_the_estimators() -> None:
    """E[grad k1] = 0, E[grad k2] = grad KL(policy || ref), E[grad k3] = grad KL(ref || policy)."""
    logits, ref = torch.randn(6).double().requires_grad_(), torch.randn(6).double().log_softmax(0)
    logp = logits.log_softmax(0)
    p = logp.detach().exp()
    reverse, forward = (logp.exp() * (logp - ref)).sum(), (ref.exp() * (ref - logp)).sum()
    expected = {"k1": 0 * reverse, "k2": reverse, "k3": forward, "k1+": reverse, "k3+": reverse}
    for name, target in expected.items():
        zero = torch.zeros(6).double()
        loss, stats = ppo_loss(logp, None, zero, p, ref_logprobs=ref, kl_coef=1.0, kl_estimator=name)
        gradient, wanted = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, target))
        assert torch.allclose(gradient, wanted, atol=1e-12), name
        value = kl_estimates(logp, ref)[name[:2]]
        assert torch.allclose(stats["kl_loss_sum"], (p * value).sum()), name
        if name in ("k1", "k3"):
            assert torch.allclose(loss, reverse)  # unbiased values, whatever the gradients


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


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf])
def test_rows_without_weight_contribute_nothing(rubbish: float) -> None:
    """Not to the loss, not to a statistic, not to a gradient, whatever they hold, targets out of range included."""
    hidden, weight, bias, targets = head_inputs(8, 4, 11, torch.float64)
    rows = row_inputs(token_logprobs(hidden, weight, targets, bias=bias), dead=0)
    dead = torch.tensor([0, 3, 7])
    live = torch.tensor([1, 2, 4, 5, 6])
    bad_rows = {k: x.index_fill(0, dead, 0.0 if k == "weights" else rubbish) for k, x in rows.items()}
    bad_hidden, bad_targets = hidden.index_fill(0, dead, rubbish), targets.index_fill(0, dead, -100)
    kwargs: dict[str, Any] = {"kl_coef": 0.3, "entropy_coef": 0.1, "dual_clip": 2.0, "old_kl_coef": 0.1}
    good_rows = {k: x[live] for k, x in rows.items()}

    def linear(h: Tensor, t: Tensor, r: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        return linear_ppo_loss(h, weight, t, bias=bias, **r, **kwargs)

    def logits(h: Tensor, t: Tensor, r: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        return logits_ppo_loss(h @ weight.T + bias, t, **r, **kwargs)

    def plain(h: Tensor, t: Tensor, r: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        return ppo_loss(h[:, 0], entropy=h[:, 1], **r, **kwargs)

    for op in (linear, logits, plain):
        h_bad, h_good = bad_hidden.requires_grad_(), hidden[live].requires_grad_()
        (bad, bad_stats), (good, good_stats) = op(h_bad, bad_targets, bad_rows), op(h_good, targets[live], good_rows)
        assert torch.allclose(bad, good) and bad.isfinite()
        assert all(torch.allclose(bad_stats[k], good_stats[k]) for k in good_stats)
        if op is not logits:  # 0 * NaN inside the product h @ W is not this op's doing
            g_bad, g_good = torch.autograd.grad(bad, h_bad)[0], torch.autograd.grad(good, h_good)[0]
            assert g_bad[dead].eq(0).all() and torch.allclose(g_bad[live], g_good)
    z = torch.randn(8, 11).double().index_fill(0, dead, rubbish).requires_grad_()
    (g,) = torch.autograd.grad(logits_ppo_loss(z, bad_targets, **bad_rows, **kwargs, inplace=False)[0], z)
    assert g[dead].eq(0).all() and g.isfinite().all() and g[live].abs().sum() > 0


@pytest.mark.parametrize("R", [0, 3])
def test_no_rows_with_weight_is_loss_zero_and_gradient_zero(R: int) -> None:
    hidden, weight, _, targets = head_inputs(R, 4, 11, torch.float32)
    zeros = torch.zeros(R)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    loss, stats = linear_ppo_loss(h, w, targets, zeros, zeros + math.nan, zeros, entropy_coef=0.1)
    assert loss == 0 and all(x == 0 for x in stats.values())
    assert all(
        g.eq(0).all() and g.shape == x.shape for g, x in zip(torch.autograd.grad(loss, (h, w)), (h, w), strict=True)
    )
    z = torch.zeros(R, 11, requires_grad=True)
    loss, _ = logits_ppo_loss(z * 1, targets, zeros, zeros, zeros)
    assert loss == 0 and torch.autograd.grad(loss, z)[0].eq(0).all()
    logp = torch.zeros(R, requires_grad=True)
    loss, _ = ppo_loss(logp, zeros, zeros, zeros)
    assert loss == 0 and torch.autograd.grad(loss, logp)[0].eq(0).all()


@settings(max_examples=20)
@given(kwargs=SETTINGS, head=HEAD, with_bias=st.booleans(), chunk_size=st.sampled_from([2, 64]))
def test_gradcheck_of_linear_ppo_loss(
    kwargs: dict[str, Any], head: dict[str, Any], with_bias: bool, chunk_size: int
) -> None:
    """Finite differences; the straight-through estimators have none and are covered by the comparison below."""
    kwargs = kwargs | {"kl_estimator": kwargs["kl_estimator"].rstrip("+")}
    hidden, weight, bias, targets = head_inputs(4, 3, 5, torch.float64)
    rows = row_inputs(token_logprobs(hidden, weight, targets))
    tensors = [x.requires_grad_() for x in ((hidden, weight, bias) if with_bias else (hidden, weight))]

    def op(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return linear_ppo_loss(h, w, targets, bias=b, chunk_size=chunk_size, **rows, **kwargs, **head)[0]

    assert torch.autograd.gradcheck(op, tensors, fast_mode=True)


@settings(max_examples=20)
@given(kwargs=SETTINGS, head=HEAD)
def test_gradcheck_of_logits_and_log_prob_losses(kwargs: dict[str, Any], head: dict[str, Any]) -> None:
    kwargs = kwargs | {"kl_estimator": kwargs["kl_estimator"].rstrip("+")}
    logits, targets = torch.randn(4, 5).double().requires_grad_(), torch.tensor([0, 4, 2, 2])
    rows = row_inputs(logits.detach().log_softmax(-1)[torch.arange(4), targets])
    assert torch.autograd.gradcheck(
        lambda z: logits_ppo_loss(z, targets, inplace=False, **rows, **kwargs, **head)[0], logits, fast_mode=True
    )
    logprobs, entropy = -torch.rand(4).double().requires_grad_(), torch.rand(4).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, e: ppo_loss(x, entropy=e, **rows, **kwargs)[0], (logprobs, entropy), fast_mode=True
    )


@settings(max_examples=30)
@given(
    kwargs=SETTINGS,
    head=HEAD,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    R=st.sampled_from([1, 3, 63]),
)
def test_fused_losses_are_as_accurate_as_plain_autograd(
    kwargs: dict[str, Any], head: dict[str, Any], dtype: torch.dtype, R: int
) -> None:
    """Loss, statistics and gradients of both fused ops against float64, all flags, every input dtype."""
    hidden, weight, bias, targets = head_inputs(R, 16, 301, dtype)
    rows = row_inputs(token_logprobs(hidden, weight, targets, bias=bias, **head))

    def run(op: Any, *tensors: Tensor) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        loss, stats = op(*leaves)
        return [loss.detach(), *torch.autograd.grad(2.5 * loss, leaves), stats["old_k2_sum"], stats["ratio_sum"]]

    def plain(h: Tensor, w: Tensor, b: Tensor) -> Any:
        same = {k: x.double() if b.dtype == torch.float64 else x for k, x in rows.items()}
        return reference_loss(h, w, b, targets, same, **kwargs, **head)

    def linear(h: Tensor, w: Tensor, b: Tensor) -> Any:
        return linear_ppo_loss(h, w, targets, bias=b, chunk_size=16, with_entropy=True, **rows, **kwargs, **head)

    def logits(h: Tensor, w: Tensor, b: Tensor) -> Any:
        z = h.float() @ w.float().T + b.float()
        return logits_ppo_loss(z, targets, with_entropy=True, **rows, **kwargs, **head)

    baseline, truth = run(plain, hidden, weight, bias), run(plain, hidden.double(), weight.double(), bias.double())
    for op in (linear, logits):
        made = run(op, hidden, weight, bias)
        names = ("loss", "dhidden", "dweight", "dbias", "old_k2", "ratio")
        for name, a, b, t in zip(names, made, baseline, truth, strict=True):
            assert_as_accurate(f"{op.__name__} {name}", a, b, t, atol=2e-6 * R)


def test_upstream_gradient_scales_and_the_graph_can_be_reused() -> None:
    hidden, weight, _, targets = head_inputs(6, 4, 11, torch.float64)
    rows = row_inputs(token_logprobs(hidden, weight, targets))
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    loss, _ = linear_ppo_loss(h, w, targets, **rows)
    once = torch.autograd.grad(loss, (h, w), retain_graph=True)
    for scale in (3.0, 0.0):
        again = torch.autograd.grad(loss, (h, w), torch.tensor(scale).double(), retain_graph=True)
        assert all(torch.allclose(a, scale * b) for a, b in zip(again, once, strict=True))


def test_frozen_inputs_get_no_gradient_and_none_means_none() -> None:
    hidden, weight, _, targets = head_inputs(6, 4, 11, torch.float32)
    rows = row_inputs(token_logprobs(hidden, weight, targets))
    loss, _ = linear_ppo_loss(hidden.requires_grad_(), weight, targets, **rows)
    loss.backward()
    assert weight.grad is None and hidden.grad is not None
    with torch.no_grad():
        free, stats = linear_ppo_loss(hidden, weight.requires_grad_(), targets, **rows)
    assert free.grad_fn is None and torch.equal(free, loss) and not any(x.requires_grad for x in stats.values())


def test_inplace_writes_the_gradient_over_the_logits() -> None:
    leaf, targets = torch.randn(5, 7).double().requires_grad_(), torch.randint(7, (5,))
    rows = row_inputs(leaf.detach().log_softmax(-1)[torch.arange(5), targets])
    loss, _ = logits_ppo_loss(leaf, targets, inplace=False, **rows)
    (expected,) = torch.autograd.grad(loss, leaf)
    logits = leaf * 1
    before = logits.detach().clone()
    with torch.no_grad():
        logits_ppo_loss(logits, targets, **rows)
    assert torch.equal(logits, before)  # no gradient wanted, nothing written
    loss, _ = logits_ppo_loss(logits, targets, **rows)
    assert torch.allclose(logits, expected)
    dlogits, dleaf = torch.autograd.grad(2 * loss, (logits, leaf), retain_graph=True)
    assert torch.allclose(dleaf, 2 * expected) and dlogits.data_ptr() == logits.data_ptr()  # no second (R, V) tensor
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(loss, leaf)
    with pytest.raises(ValueError, match="logits is a leaf that requires grad.*inplace=False"):
        logits_ppo_loss(leaf, targets, **rows)


def test_inplace_cannot_corrupt_an_output_that_autograd_still_needs() -> None:
    """tanh keeps its output for its own backward: overwriting it must be an error, never a wrong gradient."""
    leaf, targets = torch.randn(5, 7).requires_grad_(), torch.randint(7, (5,))
    loss, _ = logits_ppo_loss(leaf.tanh(), targets, None, torch.ones(5), torch.ones(5))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("padding", [-math.inf, -1e30])
@pytest.mark.parametrize("kwargs", [{}, {"entropy_coef": 0.1}])
def test_padded_vocabulary_columns_do_not_exist(padding: float, kwargs: dict[str, Any]) -> None:
    logits, targets = torch.randn(5, 9).double(), torch.randint(9, (5,))
    rows = row_inputs(logits.log_softmax(-1)[torch.arange(5), targets])
    wide = torch.cat([logits, torch.full((5, 4), padding).double()], 1).requires_grad_()
    narrow = logits.requires_grad_()
    losses = [logits_ppo_loss(z, targets, inplace=False, with_entropy=True, **rows, **kwargs) for z in (wide, narrow)]
    assert torch.allclose(losses[0][0], losses[1][0])
    assert torch.allclose(losses[0][1]["entropy_sum"], losses[1][1]["entropy_sum"])
    g_wide, g_narrow = (torch.autograd.grad(x[0], z)[0] for x, z in zip(losses, (wide, narrow), strict=True))
    assert torch.allclose(g_wide[:, :9], g_narrow) and g_wide[:, 9:].eq(0).all()


def test_autocast_does_not_reach_the_maths() -> None:
    hidden, weight, _, targets = head_inputs(6, 16, 50, torch.float32)
    rows = row_inputs(token_logprobs(hidden, weight, targets))
    expected, _ = linear_ppo_loss(hidden, weight, targets, **rows)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(linear_ppo_loss(hidden, weight, targets, **rows)[0], expected)


def test_logits_dtype_rounds_the_logits() -> None:
    hidden, weight, _, targets = head_inputs(40, 16, 50, torch.bfloat16)
    z = (hidden.float() @ weight.float().T).bfloat16()
    expected = z.double().log_softmax(-1)[torch.arange(40), targets].sum()
    ones = torch.ones(40)
    _, rounded = linear_ppo_loss(hidden, weight, targets, None, ones, ones, logits_dtype=torch.bfloat16)
    _, exact = linear_ppo_loss(hidden, weight, targets, None, ones, ones)
    assert rounded["logprob_sum"].item() == pytest.approx(expected.item(), abs=1e-3)
    assert abs(exact["logprob_sum"] - expected) > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_low": 1.0}, r"clip_low must be in \[0, 1\), got 1.0; pass math.inf"),
        ({"clip_high": -0.1}, "clip_high must be >= 0"),
        ({"clip_high": math.nan}, "clip_high must be >= 0"),
        ({"dual_clip": 1.0}, "dual_clip must be > 1"),
        ({"kl_coef": -1.0}, "kl_coef must be finite and >= 0"),
        ({"kl_coef": 0.1}, "kl_coef = 0.1 needs ref_logprobs"),
        ({"old_kl_coef": math.inf}, "old_kl_coef must be finite"),
        ({"kl_estimator": "k4"}, r"kl_estimator must be one of k1, k2, k3, k1\+, k3\+, got 'k4'"),
        ({"entropy_coef": 0.1}, "needs entropy; take it from token_logprobs"),
        ({"weights": torch.ones(3, dtype=torch.bool)}, "weights must be a floating-point tensor, got torch.bool"),
        ({"advantages": torch.ones(3, 1)}, r"advantages must have shape \(R,\) = \(3,\), got \(3, 1\)"),
        ({"backend": "fast"}, "does not exist for ppo_loss"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = dict.fromkeys(("logprobs", "old_logprobs", "advantages", "weights"), torch.zeros(3))
    with pytest.raises(ValueError, match=message):
        ppo_loss(**(arguments | change))
