"""Laws of value_loss and linear_value_loss."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastppo_kernels import linear_value_loss, merge_stats, value_loss
from numerics import DEVICE, assert_as_accurate


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device=DEVICE)


def rows(R: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(values, old values, returns, weights) with values on both sides of the clip and some dead rows."""
    values, noise, returns = (torch.randn(R, dtype=dtype, device=DEVICE) for _ in range(3))
    weights = torch.rand(R, dtype=dtype, device=DEVICE)
    return values, values + 0.4 * noise, returns, torch.where(weights < 0.3, 0, weights)


def test_loss_and_statistics_of_four_rows_by_hand() -> None:
    """A value inside the clip, one whose clipped square is larger, one whose clipped square is smaller, a dead one."""
    values, old = vector(1.1, 1.0, 2.0, math.nan), vector(1.0, 0.0, 1.0, math.inf)
    returns, weights = vector(2.0, 1.5, 0.0, math.nan), vector(1.0, 2.0, 0.5, 0.0)
    loss, stats = value_loss(values, old, returns, weights, clip=0.2)
    expected = {
        "token_count": 3,
        "value_loss_sum": 0.5 * (1 * 0.81 + 2 * 1.69 + 0.5 * 4.0),
        "value_clip_count": 1,
        "value_sum": 4.1,
        "value_sq_sum": 1.21 + 1 + 4,
        "error_sq_sum": 0.81 + 0.25 + 4,
        "return_sum": 3.5,
        "return_sq_sum": 4 + 2.25,
    }
    assert set(stats) == set(expected)
    for key, value in expected.items():
        assert stats[key].item() == pytest.approx(value), key
        assert stats[key].dtype == torch.float64 and stats[key].shape == ()
    assert loss.item() == pytest.approx(expected["value_loss_sum"])


@pytest.mark.parametrize("clip", [None, math.inf])
def test_without_clip_it_is_half_the_mean_square(clip: float | None) -> None:
    values, old, returns, _ = rows(10)
    loss, stats = value_loss(values, old, returns, torch.full((10,), 0.1).double(), clip=clip)
    assert torch.allclose(loss, 0.5 * (values - returns).square().mean())
    assert stats["value_clip_count"] == 0


def test_clip_is_half_the_mean_of_the_worse_square() -> None:
    values, old, returns, _ = rows(50)
    loss, _ = value_loss(values, old, returns, torch.full((50,), 1 / 50).double(), clip=0.2)
    moved = torch.clamp(values, old - 0.2, old + 0.2)
    worse = torch.max((values - returns) ** 2, (moved - returns) ** 2)
    assert torch.allclose(loss, 0.5 * worse.mean())


@settings(max_examples=10)
@given(clip=st.sampled_from([None, 0.2, 1.0]), bias=st.sampled_from([None, (), (1,)]))
def test_gradcheck(clip: float | None, bias: tuple[int, ...] | None) -> None:
    values, old, returns, weights = rows(6)
    assert torch.autograd.gradcheck(
        lambda v: value_loss(v, old, returns, weights, clip=clip)[0], values.requires_grad_()
    )
    hidden, weight = torch.randn(6, 3).double().requires_grad_(), torch.randn(3).double().requires_grad_()
    tensors = [hidden, weight] + ([] if bias is None else [torch.randn(bias).double().requires_grad_()])
    assert torch.autograd.gradcheck(
        lambda h, w, b=None: linear_value_loss(h, w, b, old, returns, weights, clip=clip)[0], tensors
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("R", [0, 1, 3, 63])
def test_linear_value_loss_is_as_accurate_as_float32(R: int, dtype: torch.dtype) -> None:
    hidden, weight, bias = torch.randn(R, 33).to(dtype), (torch.randn(33) / 6).to(dtype), torch.randn(1).to(dtype)
    _, old, returns, weights = rows(R, torch.float32)

    def run(h: Tensor, w: Tensor, b: Tensor, plain: bool) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in (h, w, b)]
        like = torch.promote_types(h.dtype, torch.float32)
        given_ = [x.to(like) for x in (old, returns, weights)]
        if plain:
            values = (leaves[0].to(like) * leaves[1].to(like)).sum(-1) + leaves[2].to(like)
            loss = value_loss(values, *given_)[0]
        else:
            loss = linear_value_loss(*leaves, *given_)[0]
        return [loss.detach(), *torch.autograd.grad(3 * loss, leaves)]

    made, baseline = run(hidden, weight, bias, False), run(hidden, weight, bias, True)
    truth = run(hidden.double(), weight.double(), bias.double(), True)
    for name, a, b, t in zip(("loss", "dhidden", "dweight", "dbias"), made, baseline, truth, strict=True):
        assert_as_accurate(name, a, b, t, atol=1e-6)


def test_autocast_does_not_reach_the_maths() -> None:
    hidden, weight = torch.randn(5, 16), torch.randn(16)
    _, old, returns, weights = rows(5, torch.float32)
    expected, _ = linear_value_loss(hidden, weight, None, old, returns, weights)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(linear_value_loss(hidden, weight, None, old, returns, weights)[0], expected)


@pytest.mark.parametrize("rubbish", [math.nan, math.inf])
def test_rows_without_weight_contribute_nothing(rubbish: float) -> None:
    hidden, weight = torch.randn(6, 3).double(), torch.randn(3).double().requires_grad_()
    _, old, returns, weights = rows(6)
    weights = torch.rand(6).double() + 0.1
    dead, live = torch.tensor([0, 4]), torch.tensor([1, 2, 3, 5])
    bad = [x.index_fill(0, dead, rubbish) for x in (hidden, old, returns)]
    h = bad[0].requires_grad_()
    loss, stats = linear_value_loss(h, weight, None, bad[1], bad[2], weights.index_fill(0, dead, 0.0))
    good, good_stats = linear_value_loss(hidden[live], weight, None, old[live], returns[live], weights[live])
    assert torch.allclose(loss, good) and all(torch.allclose(stats[k], good_stats[k]) for k in stats)
    dh, dw = torch.autograd.grad(loss, (h, weight))
    assert dh[dead].eq(0).all() and torch.allclose(dw, torch.autograd.grad(good, weight)[0])


def test_no_rows_with_weight_is_loss_zero_and_gradient_zero() -> None:
    values = torch.full((3,), math.nan, requires_grad=True)
    loss, stats = value_loss(values, torch.zeros(3), torch.zeros(3), torch.zeros(3))
    assert loss == 0 and torch.autograd.grad(loss, values)[0].eq(0).all() and all(x == 0 for x in stats.values())


@settings(max_examples=10)
@given(cut=st.integers(0, 20))
def test_statistics_add_up_over_any_split(cut: int) -> None:
    all_rows = rows(20)
    parts = [value_loss(*(x[s] for x in all_rows)) for s in (slice(0, cut), slice(cut, 20))]
    loss, stats = value_loss(*all_rows)
    merged = merge_stats(p[1] for p in parts)
    assert torch.allclose(parts[0][0] + parts[1][0], loss) and set(merged) == set(stats)
    assert all(torch.allclose(merged[k], stats[k]) for k in stats)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip": 0.0}, "clip must be > 0, got 0.0; pass None"),
        ({"weight": torch.zeros(1, 3)}, r"hidden must be \(R, H\) and weight \(H,\)"),
        ({"bias": torch.zeros(2)}, r"bias must be one number, got shape \(2,\)"),
        ({"returns": torch.zeros(4)}, r"returns must have shape \(R,\) = \(5,\)"),
        ({"weights": torch.zeros(5, dtype=torch.int64)}, "weights must be a floating-point tensor"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = dict.fromkeys(("old_values", "returns", "weights"), torch.zeros(5))
    arguments |= {"hidden": torch.zeros(5, 3), "weight": torch.zeros(3), "bias": None}
    with pytest.raises(ValueError, match=message):
        linear_value_loss(**(arguments | change))


def test_a_value_inside_the_clip_range_is_never_counted_as_clipped() -> None:
    """Whatever old + (v - old) rounds to."""
    old, returns, weights = (
        100 * torch.randn(2000, device=DEVICE),
        torch.randn(2000, device=DEVICE),
        torch.ones(2000, device=DEVICE),
    )
    values = old + 0.19 * (2 * torch.rand(2000, device=DEVICE) - 1)
    assert value_loss(values, old, returns, weights)[1]["value_clip_count"] == 0
    assert value_loss(values, old, returns, weights, backend="reference")[1]["value_clip_count"] == 0
