"""Laws of the losses from logits and from hidden states: gradients, dead rows, memory reuse."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastppo_kernels import linear_ppo_loss, logits_ppo_loss, ppo_loss, token_logprobs
from numerics import DEVICE, assert_as_accurate
from ppo_rows import HEAD, SETTINGS, head_inputs, reference_loss, row_inputs


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
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
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
    for owned in (leaf, leaf.view_as(leaf), leaf[:, :6]):  # a view is no leaf, but its memory is the leaf's
        with pytest.raises(ValueError, match="logits is a leaf that requires grad, or a view.*inplace=False"):
            logits_ppo_loss(owned, targets % 6, **rows)
    logits_ppo_loss((leaf * 1)[:, :6], targets % 6, **rows)


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
