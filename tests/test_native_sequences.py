"""Laws of the sequence ops in C++ beyond those that hold on every backend: blocks, holes, exact sums."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastppo_kernels import reference, whiten
from fastppo_kernels.native.sequences import gae, moments, token_rewards
from native_rows import UNRESET, assert_same_bits, isa, on_every_isa, on_threads
from numerics import assert_as_accurate, guarded

__all__ = ["isa"]  # a fixture

LENGTHS = st.lists(st.sampled_from([0, 1, 2, 7, 8, 63, 64, 65, 130, 200]), max_size=4)


def packed(lengths: list[int], start: int = 0) -> Tensor:
    return torch.tensor([start, *lengths]).cumsum(0).to(torch.int32)


def holes(N: int, kind: str) -> Tensor | None:
    """(N,) bool mask: True in runs, at random, nowhere; or None."""
    runs = torch.arange(N).div(45, rounding_mode="floor").remainder(2).bool()
    masks = {"none": None, "random": torch.rand(N) > 0.4, "runs": runs, "all": torch.zeros(N, dtype=torch.bool)}
    return masks[kind]


def loop(r: Tensor, v: Tensor, cu: Tensor, mask: Tensor, bootstrap: Tensor, gamma: float, lam: float) -> list[Tensor]:
    """The definition of gae, one token at a time, in float64."""
    out = [torch.zeros(len(r), dtype=torch.float64) for _ in range(2)]
    for b in range(len(cu) - 1):
        next_value, advantage = float(bootstrap[b]), 0.0
        for t in reversed(range(int(cu[b]), int(cu[b + 1]))):
            if mask[t]:
                advantage = float(r[t]) + gamma * next_value - float(v[t]) + gamma * lam * advantage
                next_value = float(v[t])
                out[0][t], out[1][t] = advantage, advantage + next_value
    return out


@settings(max_examples=60, suppress_health_check=UNRESET)
@given(
    lengths=LENGTHS,
    kind=st.sampled_from(["none", "random", "runs", "all"]),
    decay=st.sampled_from([(1.0, 0.95), (0.99, 1.0), (1.0, 0.0), (0.0, 0.9)]),
    around=st.sampled_from([0, 5]),
    seed=st.integers(0, 99),
)
def test_gae_is_the_recurrence_rounded_once(
    isa: str, lengths: list[int], kind: str, decay: tuple[float, float], around: int, seed: int
) -> None:
    """Whole and partial blocks of 64, holes, tokens outside every sequence; NaN wherever nobody may read."""
    torch.manual_seed(seed)
    cu, N = packed(lengths, around), sum(lengths) + 2 * around
    mask, inside = holes(N, kind), torch.zeros(N, dtype=torch.bool)
    inside[around : N - around] = True
    action = inside if mask is None else inside & mask
    r, v = (guarded(torch.where(action, torch.randn(N), torch.nan)) for _ in range(2))
    bootstrap = guarded(torch.randn(len(lengths)))
    truth = loop(r, v, cu, action, bootstrap, *decay)
    made = gae(r, v, cu, gamma=decay[0], lam=decay[1], mask=mask, bootstrap_values=bootstrap)
    for name, a, t in zip(("advantages", "returns"), made, truth, strict=True):
        assert_as_accurate(name, a, t.float(), t)
        assert a[~action].eq(0).all()


def test_a_nan_reaches_only_the_earlier_tokens_of_its_sequence() -> None:
    r, v, cu = torch.randn(300), torch.randn(300), packed([100, 200])
    expected, _ = gae(r, v, cu, gamma=1.0, lam=0.9)
    r[250] = torch.nan
    made, _ = gae(r, v, cu, gamma=1.0, lam=0.9)
    assert torch.equal(made[:100], expected[:100]) and torch.equal(made[251:], expected[251:])
    assert made[100:251].isnan().all()


@given(
    lengths=LENGTHS,
    kind=st.sampled_from(["none", "random", "runs", "all"]),
    estimator=st.sampled_from(["k1", "k2", "k3", "k1+", "k3+"]),
    kl_coef=st.sampled_from([0.0, 0.3]),
    per_token=st.booleans(),
    spread=st.sampled_from([1.0, 40.0]),
    seed=st.integers(0, 99),
)
def test_token_rewards_answer_to_float64(
    lengths: list[int], kind: str, estimator: str, kl_coef: float, per_token: bool, spread: float, seed: int
) -> None:
    """Estimators beyond the bound of the exponent too; NaN in the holes."""
    torch.manual_seed(seed)
    cu, N = packed(lengths), sum(lengths)
    mask = holes(N, kind)
    action = torch.ones(N, dtype=torch.bool) if mask is None else mask
    logprobs, ref = (guarded(torch.where(action, spread * torch.randn(N), torch.nan)) for _ in range(2))
    scores = guarded(torch.randn(N if per_token else len(lengths)))
    if len(scores) == N and not per_token:
        return  # read as one score per token
    settings = {"kl_coef": kl_coef, "kl_estimator": estimator, "mask": mask}
    made = token_rewards(scores, logprobs, ref if kl_coef else None, cu, **settings)
    double = (scores.double(), logprobs.double(), ref.double() if kl_coef else None)
    truth = reference.token_rewards(*double, cu, **settings)
    assert_as_accurate("rewards", made, truth.float(), truth)
    assert made[~action].eq(0).all()


@pytest.mark.parametrize("kind", ["none", "random"])
def test_neither_threads_nor_instruction_sets_change_a_bit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pieces of work, sequences of very different lengths in each."""
    cu = packed([7, 20_000, 0, 33, 40_000, 1, 64, 30_000, 5, 9000] * 2)
    N = int(cu[-1])
    r, v, mask, scores = torch.randn(N), torch.randn(N), holes(N, kind), torch.randn(20)

    def made() -> tuple[Tensor, ...]:
        rewards = token_rewards(scores, r, v, cu, kl_coef=0.1, kl_estimator="k3", mask=mask)
        return *gae(r, v, cu, gamma=0.99, lam=0.95, mask=mask), rewards, moments(r, mask)

    assert_same_bits([*on_threads(made), *on_every_isa(monkeypatch, made).values()])


@pytest.mark.parametrize("apart", [math.inf, -math.inf])
def test_a_kl_estimate_of_what_is_infinitely_far_is_that_of_the_reference(apart: float) -> None:
    given = (torch.zeros(1), torch.tensor([apart, 0.0]), torch.zeros(2), packed([2]))
    for estimator in ("k1", "k2", "k3"):
        made = token_rewards(*given, kl_coef=0.1, kl_estimator=estimator)
        truth = reference.token_rewards(*given, kl_coef=0.1, kl_estimator=estimator)
        assert torch.equal(made.nan_to_num(7.0), truth.nan_to_num(7.0)), estimator


def test_the_score_goes_to_the_last_action_of_its_sequence() -> None:
    mask = torch.tensor([True, True, False, False, True, False])
    made = token_rewards(
        torch.tensor([1.0, 2.0, 3.0]),
        torch.zeros(6),
        None,
        packed([3, 1, 2]),
        kl_coef=0.0,
        kl_estimator="k1",
        mask=mask,
    )
    assert made.tolist() == [0, 1, 0, 0, 3, 0]  # the second sequence has no action to credit


@pytest.mark.parametrize("cu", [[0, 9], [3, 2, 5], [-1, 5]])
def test_nothing_outside_the_tensors_is_read(cu: list[int]) -> None:
    bounds, zeros = torch.tensor(cu, dtype=torch.int32), torch.zeros(5)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 or more to at most N = 5"):
        token_rewards(torch.zeros(len(cu) - 1), zeros, None, bounds, kl_coef=0.0, kl_estimator="k1")
    with pytest.raises(ValueError, match="cu_seqlens must rise"):
        gae(zeros, zeros, bounds, gamma=1.0, lam=0.95)


@pytest.mark.parametrize("N", [1, 7, 1023, 1024, 1025, 20_000])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_are_those_of_float64(isa: str, N: int, masked: bool, offset: float) -> None:
    mask = torch.rand(N) > 0.3 if masked else None
    values = torch.randn(N) * torch.linspace(0.1, 3, N) + offset
    chosen = values.double() if mask is None else values[mask].double()
    if mask is not None:
        values = torch.where(mask, values, torch.nan)
    count, mean, square = moments(guarded(values), mask).tolist()
    assert count == len(chosen)
    if count:
        assert mean == pytest.approx(chosen.mean().item(), rel=1e-13, abs=1e-13)
        assert square == pytest.approx((chosen - chosen.mean()).square().sum().item(), rel=1e-9)


@pytest.mark.parametrize("constant", [0.1, 2075.3, -1e20])
@pytest.mark.parametrize("N", [3, 4097, 10_000])
def test_equal_values_deviate_by_exactly_nothing(isa: str, constant: float, N: int) -> None:
    values = torch.full((N,), constant)
    assert moments(values, None).tolist() == [N, values[0].item(), 0.0]


def test_no_valid_value_has_moments_of_zero_and_any_shape_will_do() -> None:
    assert moments(torch.full((3,), math.nan), torch.zeros(3, dtype=torch.bool)).tolist() == [0, 0, 0]
    assert moments(torch.zeros(0), None).tolist() == [0, 0, 0]
    values, mask = torch.randn(6, 50).T, torch.rand(50, 6) > 0.5
    count, mean, square = moments(values, mask).unbind()
    whitened = torch.where(mask, (values.double() - mean) * torch.rsqrt(square / count + reference.WHITEN_EPS), 0)
    assert torch.allclose(whitened.float(), whiten(values, mask), atol=1e-6)
