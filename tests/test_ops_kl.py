"""What the KL penalties do as a loss and in the reward, where the optimum is known."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastppo_kernels import ppo_loss, token_rewards
from fastppo_kernels.reference import kl_estimates
from numerics import DEVICE
from ppo_rows import vector

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
