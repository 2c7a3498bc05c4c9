"""Laws of gae and token_rewards, on every backend."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastppo_kernels import gae, token_rewards, whiten
from numerics import DEVICE, assert_as_accurate, guarded

BACKENDS = ["reference", "native"] if DEVICE == "cpu" else ["reference"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def packed(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(torch.int32).to(DEVICE)


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device=DEVICE)


def loop(
    r: Tensor, v: Tensor, cu: Tensor, mask: Tensor, bootstrap: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """The definition, read backwards one token at a time, in float64."""
    advantages, returns = torch.zeros(len(r), dtype=torch.float64), torch.zeros(len(r), dtype=torch.float64)
    for b in range(len(cu) - 1):
        next_value, advantage = float(bootstrap[b]), 0.0
        for t in reversed(range(int(cu[b]), int(cu[b + 1]))):
            if mask[t]:
                delta = float(r[t]) + gamma * next_value - float(v[t])
                advantage = delta + gamma * lam * advantage
                next_value = float(v[t])
                advantages[t], returns[t] = advantage, advantage + float(v[t])
    return advantages, returns


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(0, 9), max_size=6),
    gamma=st.sampled_from([1.0, 0.9, 0.0]),
    lam=st.sampled_from([1.0, 0.95, 0.0]),
    holes=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 99),
)
def test_gae_is_the_backward_recurrence(lengths: list[int], gamma: float, lam: float, holes: float, seed: int) -> None:
    """Random lengths (0 among them), holes and bootstraps; NaN in the holes and no read past the end."""
    torch.manual_seed(seed)
    cu, N, B = packed(lengths), sum(lengths), len(lengths)
    mask = torch.rand(N) >= holes
    r, v = (guarded(torch.where(mask, torch.randn(N), torch.nan)) for _ in range(2))
    bootstrap = torch.randn(B)
    truth = loop(r, v, cu, mask, bootstrap, gamma, lam)
    rewards, values = r.to(DEVICE), v.to(DEVICE)
    kwargs: dict[str, Any] = {"gamma": gamma, "lam": lam, "mask": mask.to(DEVICE)}
    kwargs["bootstrap_values"] = bootstrap.to(DEVICE)
    for backend in BACKENDS:
        made = gae(rewards, values, cu, backend=backend, **kwargs)
        for name, a, t in zip(("advantages", "returns"), made, truth, strict=True):
            assert_as_accurate(f"{backend} {name}", a.cpu(), t.float(), t, atol=1e-5)
            assert a.cpu()[~mask].eq(0).all()
    double = gae(rewards.double(), values.double(), cu, **kwargs)
    assert all(torch.allclose(a.cpu(), t, atol=1e-12) for a, t in zip(double, truth, strict=True))


@every_backend
def test_long_sequences(backend: str) -> None:
    lengths = [700, 1, 0, 1300]
    N, cu = sum(lengths), packed(lengths)
    r, v, mask = torch.randn(N), torch.randn(N), torch.rand(N) > 0.1
    truth = loop(r, v, cu, mask, torch.zeros(4), 0.999, 0.97)
    made = gae(r.to(DEVICE), v.to(DEVICE), cu, gamma=0.999, lam=0.97, mask=mask.to(DEVICE), backend=backend)
    for a, t in zip(made, truth, strict=True):
        assert torch.allclose(a.cpu().double(), t, atol=2e-5)


@every_backend
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_score_of_the_last_action_reaches_it_undecayed(backend: str, lam: float) -> None:
    """With V = 0 the last action's advantage is the score, whatever lambda: no step lies beyond it."""
    cu = packed([4])
    rewards = token_rewards(vector(1.0), torch.zeros(4), None, cu, kl_coef=0.0)
    advantages, _ = gae(rewards, torch.zeros(4), cu, lam=lam, backend=backend)
    assert torch.allclose(advantages, vector(lam**3, lam**2, lam, 1.0))


@every_backend
def test_monte_carlo_limit_is_reward_to_go(backend: str) -> None:
    """gamma = lam = 1: A_t = (rewards still to come) - V_t."""
    r, v, cu = torch.randn(7), torch.randn(7), packed([3, 4])
    advantages, returns = gae(r, v, cu, lam=1.0, backend=backend)
    to_go = torch.cat([r[:3].flip(0).cumsum(0).flip(0), r[3:].flip(0).cumsum(0).flip(0)])
    assert torch.allclose(advantages, to_go - v, atol=1e-6)
    assert torch.allclose(returns, to_go, atol=1e-6)


@every_backend
def test_one_step_limit_is_the_td_error(backend: str) -> None:
    r, v = torch.randn(5), torch.randn(5)
    advantages, _ = gae(r, v, packed([5]), gamma=0.9, lam=0.0, backend=backend)
    assert torch.allclose(advantages, r + 0.9 * torch.cat([v[1:], torch.zeros(1)]) - v, atol=1e-6)


@every_backend
def test_known_answer_and_masked_tail(backend: str) -> None:
    expected = vector(0.45125, 0.475, 0.5), vector(0.95125, 0.975, 1.0)
    made = gae(vector(0, 0, 1), torch.full((3,), 0.5), packed([3]), backend=backend)
    assert all(torch.allclose(a, e) for a, e in zip(made, expected, strict=True))
    mask = torch.tensor([True, True, True, False])
    tail = gae(vector(0, 0, 1, 7), vector(0.5, 0.5, 0.5, 123), packed([4]), mask=mask, backend=backend)
    for a, e in zip(tail, expected, strict=True):
        assert torch.allclose(a[:3], e) and a[3] == 0
    unmasked = gae(vector(0, 0, 1, 0), vector(0.5, 0.5, 0.5, 3), packed([4]), backend=backend)[0]
    assert torch.allclose(unmasked, vector(0.5866, 0.6175, 0.65, -3), atol=1e-4)  # what a forgotten mask looks like


@every_backend
def test_tool_output_adds_no_lambda_step(backend: str) -> None:
    mask = torch.tensor([True, False, True, True])
    advantages, returns = gae(vector(0, 9, 0, 1), vector(0.5, 77, 0.5, 0.5), packed([4]), mask=mask, backend=backend)
    assert torch.allclose(advantages, vector(0.45125, 0, 0.475, 0.5))
    assert torch.allclose(returns, vector(0.95125, 0, 0.975, 1.0))


@every_backend
def test_truncation_bootstraps_and_termination_does_not(backend: str) -> None:
    r, v, cu = torch.zeros(3), torch.full((3,), 0.5), packed([3])
    cut = gae(r, v, cu, bootstrap_values=vector(0.8), backend=backend)[0]
    assert torch.allclose(cut, vector(0.27075, 0.285, 0.3))
    ended = gae(r, v, cu, backend=backend)[0]
    assert torch.allclose(ended, vector(-0.45125, -0.475, -0.5))
    assert torch.equal(ended, gae(r, v, cu, bootstrap_values=vector(0.0), backend=backend)[0])


@every_backend
def test_sequences_do_not_see_each_other(backend: str) -> None:
    """Packing changes nothing, in any order, and a NaN stays in its own sequence."""
    a, b = (torch.randn(5), torch.randn(5)), (torch.randn(3), torch.randn(3))
    alone = gae(a[0], a[1], packed([5]), backend=backend)[0]
    after = gae(torch.cat([b[0], a[0]]), torch.cat([b[1], a[1]]), packed([3, 5]), backend=backend)[0]
    before = gae(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]]), packed([5, 0, 3]), backend=backend)[0]
    assert torch.allclose(after[3:], alone, atol=1e-6) and torch.allclose(before[:5], alone, atol=1e-6)
    broken = gae(
        torch.cat([a[0], torch.full((3,), torch.nan)]), torch.cat([a[1], b[1]]), packed([5, 3]), backend=backend
    )
    assert torch.allclose(broken[0][:5], alone, atol=1e-6) and broken[0][5:].isnan().all()


@every_backend
def test_empty_batches(backend: str) -> None:
    for lengths in ([], [0], [0, 0]):
        advantages, returns = gae(torch.zeros(0), torch.zeros(0), packed(lengths), backend=backend)
        assert advantages.shape == returns.shape == (0,)


def test_returns_are_of_the_unwhitened_advantages() -> None:
    r, v = torch.randn(6), torch.randn(6)
    advantages, returns = gae(r, v, packed([6]))
    assert torch.allclose(returns, advantages + v)
    assert not torch.allclose(returns, whiten(advantages) + v, atol=1e-2)


@pytest.mark.skipif(DEVICE != "cpu", reason="the C++ backend takes CPU tensors")
def test_strided_inputs_and_the_backend_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    r, v = torch.randn(10)[::2], torch.randn(10)[::2]
    expected = gae(r.contiguous(), v.contiguous(), packed([5]))
    assert torch.equal(gae(r, v, packed([5]))[0], expected[0])
    with pytest.raises(
        ValueError, match="'native' does not exist for gae on cpu torch.float64 tensors; available: reference"
    ):
        gae(r.double(), v.double(), packed([5]), backend="native")
    with pytest.raises(ValueError, match="available: native, reference"):
        gae(r, v, packed([5]), backend="fast")
    monkeypatch.setenv("FASTPPO_BACKEND", "reference")
    monkeypatch.setattr("fastppo_kernels.native.sequences.load", lambda: pytest.fail("FASTPPO_BACKEND was ignored"))
    gae(r, v, packed([5]))


@pytest.mark.skipif(DEVICE != "cpu", reason="the C++ backend takes CPU tensors")
@pytest.mark.parametrize("cu", [[0, 9], [3, 2, 5], [-1, 5]])
def test_native_never_reads_outside_its_tensors(cu: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens must rise"):
        gae(torch.zeros(5), torch.zeros(5), torch.tensor(cu, dtype=torch.int32), backend="native")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(4)}, r"values must have shape \(R,\) = \(3,\), got \(4,\)"),
        ({"cu_seqlens": torch.tensor([0, 3])}, r"cu_seqlens must be \(B\+1,\) int32"),
        ({"mask": torch.ones(3)}, "mask must be bool"),
        ({"bootstrap_values": torch.zeros(2)}, r"bootstrap_values must have shape \(B,\) = \(1,\)"),
        ({"gamma": 1.1}, r"gamma must be in \[0, 1\], got 1.1"),
        ({"lam": -0.1}, r"lam must be in \[0, 1\]"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"rewards": torch.zeros(3), "values": torch.zeros(3), "cu_seqlens": packed([3])}
    with pytest.raises(ValueError, match=message):
        gae(**(arguments | change))


def test_rewards_of_a_sequence_sum_to_its_score_less_the_penalty() -> None:
    lengths, B = [3, 0, 5, 1], 4
    N, cu = sum(lengths), packed(lengths)
    scores, logprobs, ref = torch.randn(B), -torch.rand(N), -torch.rand(N)
    rewards = token_rewards(scores, logprobs, ref, cu, kl_coef=0.3)
    for b, (start, end) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
        k1 = (logprobs - ref)[start:end]
        expected = scores[b] - 0.3 * k1.sum() if end > start else torch.zeros(())
        assert torch.allclose(rewards[start:end].sum(), expected, atol=1e-6)
        assert torch.allclose(
            rewards[start : max(end - 1, start)], -0.3 * (logprobs - ref)[start : max(end - 1, start)]
        )


@pytest.mark.parametrize(
    ("estimator", "value"), [("k1", lambda d: d), ("k2", lambda d: d * d / 2), ("k3", lambda d: (-d).exp() - 1 + d)]
)
def test_penalty_is_the_named_estimator(estimator: str, value: Any) -> None:
    logprobs, ref = -torch.rand(4), -torch.rand(4)
    rewards = token_rewards(torch.zeros(4), logprobs, ref, packed([3, 1]), kl_coef=2.0, kl_estimator=estimator)
    assert torch.allclose(rewards, -2.0 * value(logprobs - ref), atol=1e-6)


def test_score_goes_to_the_last_action_before_a_masked_tail() -> None:
    mask = torch.tensor([False, True, True, False, False, False])
    logprobs = vector(torch.nan, 0, 0, torch.nan, torch.nan, torch.nan)
    rewards = token_rewards(vector(5, 7), logprobs, torch.zeros(6), packed([4, 2]), kl_coef=1.0, mask=mask)
    assert torch.equal(rewards, vector(0, 0, 5, 0, 0, 0))  # the second sequence has no action and loses its score


def test_scores_per_token_stay_where_they_are() -> None:
    mask = torch.tensor([True, False, True])
    rewards = token_rewards(vector(1, 2, 3), torch.zeros(3), None, packed([1, 2]), kl_coef=0.0, mask=mask)
    assert torch.equal(rewards, vector(1, 0, 3))


def test_scores_that_can_be_read_in_two_ways_are_refused() -> None:
    one_each = token_rewards(vector(1, 2), torch.zeros(2), None, packed([1, 1]), kl_coef=0.0)
    assert torch.equal(one_each, vector(1, 2))
    with pytest.raises(ValueError, match="per sequence or per token .*drop the sequences of length 0"):
        token_rewards(vector(1, 2), torch.zeros(2), None, packed([2, 0]), kl_coef=0.0)
    with pytest.raises(ValueError, match=r"scores must be \(B,\) = \(2,\) or \(N,\) = \(4,\), got \(3,\)"):
        token_rewards(torch.zeros(3), torch.zeros(4), None, packed([2, 2]), kl_coef=0.0)
    with pytest.raises(ValueError, match="kl_coef must be >= 0, and 0 if ref_logprobs is None"):
        token_rewards(torch.zeros(2), torch.zeros(4), None, packed([2, 2]), kl_coef=0.1)
    with pytest.raises(ValueError, match="a reward has no gradient"):
        token_rewards(torch.zeros(2), torch.zeros(4), torch.zeros(4), packed([2, 2]), kl_coef=0.1, kl_estimator="k3+")


def test_no_sequence_is_no_advantage() -> None:
    x = torch.ones(3, device=DEVICE)
    advantages, returns = gae(x, x, packed([]), bootstrap_values=x[:0])
    assert not advantages.any() and not returns.any()
    advantages, returns = gae(x, x, packed([]), bootstrap_values=x[:0], backend="reference")
    assert not advantages.any() and not returns.any()
