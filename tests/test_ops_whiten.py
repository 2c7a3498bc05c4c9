"""Laws of whiten."""

import math
import multiprocessing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastppo_kernels import reference, whiten
from numerics import DEVICE, assert_as_accurate


def test_padding_takes_no_part() -> None:
    """[[1, 2, pad], [3, 4, 5]]: mean 0 and standard deviation 1 on the mask, exactly 0 off it."""
    for pad in (0.0, 1e9, float("nan")):
        values = torch.tensor([[1.0, 2, pad], [3, 4, 5]], device=DEVICE)
        mask = torch.tensor([[True, True, False], [True, True, True]], device=DEVICE)
        made = whiten(values, mask)
        assert made[0, 2] == 0
        assert torch.allclose(made[mask].mean(), torch.zeros((), device=DEVICE), atol=1e-7)
        assert torch.allclose(made[mask].var(unbiased=False), torch.ones((), device=DEVICE))


def test_variance_is_the_biased_one() -> None:
    """1.2, 1.3 .. 2.0: divided by n the variance is 0.0667, divided by n - 1 it would be 0.075."""
    values = torch.linspace(1.2, 2.0, 9).double()
    assert torch.allclose(whiten(values), (values - 1.6) / math.sqrt(0.2 / 3), atol=1e-6)


def test_epsilon_is_inside_the_root() -> None:
    made = whiten(torch.tensor([-1e-4, 1e-4]).double())
    assert torch.allclose(made, torch.tensor([-1.0, 1.0]).double() / 2**0.5)  # 1e-4 / sqrt(1e-8 + 1e-8)


def test_rewards_keep_their_mean() -> None:
    values = torch.randn(100) * 3 + 5
    made = whiten(values, shift_mean=False)
    assert torch.allclose(made.mean(), values.mean(), atol=1e-5)
    assert torch.allclose(made.std(unbiased=False), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("constant", [0.1, 2075.3, -1e20])
@pytest.mark.parametrize("n", [1, 3, 1000])
def test_equal_values_become_exactly_zero(constant: float, n: int) -> None:
    assert whiten(torch.full((n,), constant)).eq(0).all()
    assert torch.equal(whiten(torch.full((n,), constant), shift_mean=False), torch.full((n,), constant))


def test_large_mean_does_not_cancel() -> None:
    """E[x^2] - E[x]^2 of float32 values around 1e4 with spread 1e-2 has no correct digit."""
    values = torch.randn(1000) * 1e-2 + 1e4
    assert whiten(values).square().mean().item() == pytest.approx(1, abs=1e-2)


def test_nothing_valid_is_zero_not_nan() -> None:
    assert whiten(torch.randn(4), torch.zeros(4, dtype=torch.bool)).eq(0).all()
    assert whiten(torch.zeros(0)).shape == (0,)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_whitening_is_as_accurate_as_two_passes_of_pytorch(dtype: torch.dtype, shift_mean: bool) -> None:
    values, mask = (torch.randn(301) * 7 + 3).to(dtype), torch.rand(301) > 0.3
    truth = reference.whiten(values.double(), mask, shift_mean=shift_mean)
    baseline = reference.whiten(values, mask, shift_mean=shift_mean)
    assert_as_accurate("whitened", whiten(values, mask, shift_mean=shift_mean), baseline, truth)


def whiten_on_rank(rank: int, folder: str) -> None:
    """One of two ranks: whitens its part of the batch and saves what it got."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    values, mask = two_parts()[rank]
    group = torch.distributed.group.WORLD
    torch.save([whiten(values, mask, shift_mean=s, group=group) for s in (True, False)], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def two_parts() -> list[tuple[Tensor, Tensor]]:
    """Parts of different size, mean and number of valid tokens; the second has no valid token in its tail."""
    generator = torch.Generator().manual_seed(7)
    values = torch.randn(90, generator=generator) * torch.linspace(1, 5, 90) + 3
    mask = torch.rand(90, generator=generator) > 0.4
    return [(values[:30], mask[:30]), (values[30:], mask[30:])]


def test_two_ranks_whiten_as_one_batch(tmp_path: Path) -> None:
    """Averaging the moments of the ranks would weigh their tokens differently."""
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=whiten_on_rank, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=60)
    values, mask = (torch.cat(x) for x in zip(*two_parts(), strict=True))
    made = [torch.cat(parts) for parts in zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)), strict=True)]
    for whitened, shift_mean in zip(made, (True, False), strict=True):
        assert torch.allclose(whitened, whiten(values, mask, shift_mean=shift_mean), atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask must be bool of shape \(3,\), got torch.float32 \(3,\)"):
        whiten(torch.zeros(3), torch.ones(3))
    with pytest.raises(ValueError, match="values must be a floating-point tensor"):
        whiten(torch.zeros(3, dtype=torch.int64))
