"""Laws of the Triton kernels of packed sequences: gae, token_rewards, moments."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastppo_kernels import reference
from fastppo_kernels.gpu import launch, sequences, tokens
from fastppo_kernels.reference import PPORows
from fastppo_kernels.settings import PPOSettings
from fastppo_kernels.table import PPO_COLUMNS
from numerics import DEVICE, assert_as_accurate, guarded

# numpy interprets the kernels where there is no GPU, and warns of NaN and infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
NAN = float("nan")


@pytest.fixture(params=[4, 64], scope="module", autouse=True)
def block_tokens(request: pytest.FixtureRequest) -> Any:
    """Blocks so small that sequences need many, and so large that they need one."""
    before, sequences.BLOCK_TOKENS = sequences.BLOCK_TOKENS, request.param
    yield request.param
    sequences.BLOCK_TOKENS = before


def packed(lengths: list[int], before: int = 0) -> Tensor:
    return torch.tensor([before, *lengths]).cumsum(0).to(torch.int32).to(DEVICE)


def place(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(DEVICE)


def assert_gae(rewards: Tensor, values: Tensor, cu: Tensor, **kwargs: Any) -> None:
    """Both outputs as accurate as plain float32, the truth in float64; arguments on the CPU but cu."""
    on_device: dict[str, Any] = {k: place(v) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    made = sequences.gae(rewards.to(DEVICE), values.to(DEVICE), cu, **on_device)
    plain = reference.gae(rewards, values, cu.cpu(), **kwargs)
    double: dict[str, Any] = {
        k: v.double() if k == "bootstrap_values" and v is not None else v for k, v in kwargs.items()
    }
    truth = reference.gae(rewards.double(), values.double(), cu.cpu(), **double)
    for name, a, p, t in zip(("advantages", "returns"), made, plain, truth, strict=True):
        assert_as_accurate(name, a.cpu(), p, t)


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 11), max_size=5),
    outside=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    gamma=st.sampled_from([1.0, 0.9, 0.0]),
    lam=st.sampled_from([1.0, 0.95, 0.0]),
    holes=st.sampled_from([None, 0.4, 1.0]),
    bootstrap=st.booleans(),
    seed=st.integers(0, 99),
)
def test_gae_answers_to_float64(
    lengths: list[int],
    outside: tuple[int, int],
    gamma: float,
    lam: float,
    holes: float | None,
    bootstrap: bool,
    seed: int,
) -> None:
    """Empty sequences, none at all, holes, tokens before the first and after the last sequence, NaN where no action."""
    torch.manual_seed(seed)
    N, cu = sum(lengths) + sum(outside), packed(lengths, outside[0])
    mask = None if holes is None else torch.rand(N) >= holes
    position = torch.arange(N)
    action = (position >= outside[0]) & (position < N - outside[1]) & (True if mask is None else mask)
    r, v = (guarded(torch.where(action, torch.randn(N), NAN)) for _ in range(2))
    after = torch.randn(len(lengths)) if bootstrap and lengths else None
    assert_gae(r, v, cu, gamma=gamma, lam=lam, mask=mask, bootstrap_values=after)


def test_large_values_cost_gae_no_accuracy(block_tokens: int) -> None:
    """Values about 100, advantages about 1: carrying V and A in one number would round at the size of V."""
    r, v = torch.randn(300), 100 + torch.randn(300)
    for lam in (0.0, 0.95, 1.0):
        assert_gae(r, v, packed([300]), gamma=1.0, lam=lam, mask=torch.rand(300) > 0.2)


def test_a_nan_reaches_the_earlier_actions_of_its_sequence_only() -> None:
    r, v, cu = torch.randn(12).to(DEVICE), torch.randn(12).to(DEVICE), packed([4, 5, 3])
    r[6] = NAN
    for mask in (None, torch.ones(12, dtype=torch.bool, device=DEVICE)):
        advantages, returns = sequences.gae(r, v, cu, gamma=0.9, lam=0.5, mask=mask)
        poisoned = (torch.arange(12) >= 4) & (torch.arange(12) <= 6)
        assert torch.equal(advantages.isnan().cpu(), poisoned) and torch.equal(returns.isnan().cpu(), poisoned)
        advantages, _ = sequences.gae(r, v, cu, gamma=0.9, lam=0.0, mask=mask)  # no later advantage counts
        assert torch.equal(advantages.isnan().cpu(), torch.arange(12) == 6)


def test_cu_seqlens_beyond_the_tokens_touch_no_other_memory(block_tokens: int) -> None:
    r = guarded(torch.zeros(6)).to(DEVICE)
    cu = torch.tensor([-3, 2, 900], dtype=torch.int32, device=DEVICE)
    advantages, _ = sequences.gae(r, r, cu, gamma=1.0, lam=1.0)
    assert advantages.eq(0).all()


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 11), min_size=1, max_size=5),
    outside=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    estimator=st.sampled_from(["k1", "k2", "k3"]),
    kl_coef=st.sampled_from([0.0, 0.3]),
    holes=st.sampled_from([None, 0.4, 1.0]),
    per_token=st.booleans(),
    seed=st.integers(0, 99),
)
def test_token_rewards_answer_to_float64(
    lengths: list[int],
    outside: tuple[int, int],
    estimator: str,
    kl_coef: float,
    holes: float | None,
    per_token: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    N, cu = sum(lengths) + sum(outside), packed(lengths, outside[0])
    per_token = per_token or len(lengths) == N
    mask = None if holes is None else torch.rand(N) >= holes
    position = torch.arange(N)
    action = (position >= outside[0]) & (position < N - outside[1]) & (True if mask is None else mask)
    logprobs, ref = (guarded(torch.where(action, torch.randn(N) * 3, NAN)) for _ in range(2))
    scores = guarded(torch.where(action, torch.randn(N), NAN)) if per_token else torch.randn(len(lengths))
    kwargs: dict[str, Any] = {"kl_coef": kl_coef, "kl_estimator": estimator}
    inputs = (x.to(DEVICE) for x in (scores, logprobs, ref))
    made = sequences.token_rewards(*inputs, cu_seqlens=cu, **kwargs, mask=place(mask))
    plain = reference.token_rewards(scores, logprobs, ref, cu.cpu(), **kwargs, mask=mask)
    double = (x.double() for x in (scores, logprobs, ref))
    truth = reference.token_rewards(*double, cu_seqlens=cu.cpu(), **kwargs, mask=mask)
    assert_as_accurate(f"{estimator} rewards", made.cpu(), plain, truth)


def test_k3_is_precise_near_zero_and_bounded_far_away() -> None:
    """k3(d) = d^2 / 2 where exp(d) - 1 - d cancels, and exp is not followed beyond 20."""
    d = torch.tensor([1e-4, -1e-3, 0.24, -0.26, 3.0, -19.0, -25.0, 60.0])
    cu, zero = packed([8]), torch.zeros(8)
    inputs = (x.to(DEVICE) for x in (zero, d, zero))
    made = -sequences.token_rewards(*inputs, cu_seqlens=cu, kl_coef=1.0, kl_estimator="k3").cpu()
    truth = reference.k3(-d.double())
    assert ((made.double() - truth).abs() <= 1e-6 * truth).all()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_reward_and_the_loss_have_one_estimate(estimator: str) -> None:
    """The same bits on either way of penalising the KL."""
    logprobs, ref = -3 * torch.rand(200, device=DEVICE), -3 * torch.rand(200, device=DEVICE)
    ref[:4] = logprobs[:4] - torch.tensor([0.0, 1e-4, 30.0, -30.0], device=DEVICE)
    zero, one = torch.zeros(200, device=DEVICE), torch.ones(200, device=DEVICE)
    s = PPOSettings(kl_coef=1.0, kl_estimator=estimator)
    table = tokens.ppo_tokens(logprobs, None, PPORows(None, zero, one, ref), s)
    penalty = sequences.token_rewards(zero, logprobs, ref, packed([200]), kl_coef=1.0, kl_estimator=estimator)
    assert torch.equal(table[:, PPO_COLUMNS.index("kl_loss")], 0 - penalty)


def test_a_sequence_without_actions_gets_no_score_and_no_log_probs_are_read_without_a_coefficient() -> None:
    scores, mask = torch.tensor([NAN, 2.0]), torch.tensor([False, False, True, True, False])
    nans = torch.full((5,), NAN).to(DEVICE)
    cu = packed([2, 3])
    made = sequences.token_rewards(
        scores.to(DEVICE), nans, None, cu, kl_coef=0.0, kl_estimator="k1", mask=mask.to(DEVICE)
    )
    assert made.tolist() == [0, 0, 0, 2, 0]


@settings(max_examples=25)
@given(
    N=st.sampled_from([0, 1, 7, 64, 300]),
    dead=st.sampled_from([None, 0.5, 1.0]),
    offset=st.sampled_from([0.0, 1e6]),
    block=st.sampled_from([16, 512]),
)
def test_moments_are_those_of_float64(N: int, dead: float | None, offset: float, block: int) -> None:
    before, sequences.BLOCK_VALUES = sequences.BLOCK_VALUES, block
    mask = None if dead is None else torch.rand(N) >= dead
    x = guarded(torch.where(torch.ones(N, dtype=torch.bool) if mask is None else mask, torch.randn(N) + offset, NAN))
    made = sequences.moments(x.to(DEVICE), place(mask)).cpu()
    sequences.BLOCK_VALUES = before
    chosen = (x if mask is None else x[mask]).double()
    mean = chosen.mean() if len(chosen) else chosen.new_zeros(())
    assert made.dtype == torch.float64 and made[0] == len(chosen)
    assert torch.allclose(made[1], mean, rtol=1e-14) and torch.allclose(made[2], (chosen - mean).square().sum())


def test_equal_values_deviate_by_exactly_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "BLOCK_VALUES", 256)
    made = sequences.moments(torch.full((3, 1000), 0.1).to(DEVICE), None)
    assert made[0] == 3000 and made[1] == torch.tensor(0.1).double() and made[2] == 0


def test_a_block_of_the_real_size_holds_a_long_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "BLOCK_TOKENS", 1024)
    r, v, mask = torch.randn(2600), torch.randn(2600), torch.rand(2600) > 0.1
    assert_gae(r, v, packed([2300, 0, 290], 10), gamma=0.999, lam=0.97, mask=mask, bootstrap_values=torch.randn(3))


def test_cpu_tensors_without_the_interpreter_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    x, cu = torch.zeros(3), torch.tensor([0, 3], dtype=torch.int32)
    for run in (
        lambda: sequences.gae(x, x, cu, gamma=1.0, lam=1.0),
        lambda: sequences.token_rewards(x, x, None, cu, kl_coef=0.0, kl_estimator="k1"),
        lambda: sequences.moments(x, None),
    ):
        with pytest.raises(ValueError, match="the Triton kernels got CPU tensors"):
            run()
