"""One rule for comparing an op with its float64 truth, and inputs that betray a read out of bounds."""

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def assert_as_accurate(name: str, actual: Tensor, baseline: Tensor, truth: Tensor, *, atol: float = 0.0) -> None:
    """`actual` may err from the float64 `truth` at most twice what `baseline` errs, plus two ulps, plus `atol`.

    `baseline` is plain PyTorch in the op's own dtype, so the bound follows dtype and shape instead of being tuned per
    test. The ulps, of the largest true value, cover tiny shapes, where `baseline` can be exact by luck. A shape, a
    dtype or a NaN that differs fails; an infinity must be met by the same infinity.
    """
    if actual.shape != truth.shape or actual.dtype != baseline.dtype or truth.dtype != torch.float64:
        found = [f"{tuple(x.shape)} {x.dtype}" for x in (actual, baseline, truth)]
        raise AssertionError(f"{name}: shapes and dtypes of actual, baseline and truth are {', '.join(found)}")
    if actual.numel() == 0:
        return
    two_ulps = 2 * torch.finfo(actual.dtype).eps * truth.detach().nan_to_num(0.0, 0.0, 0.0).abs().max()
    error, allowed = _error(actual, truth), 2 * _error(baseline, truth).max() + two_ulps + atol
    worst = error.max()
    if not bool(worst <= allowed):  # written so that NaN fails
        raise AssertionError(f"{name}: error {worst:.3e} exceeds {allowed:.3e} at flat index {int(error.argmax())}")


def _error(x: Tensor, truth: Tensor) -> Tensor:
    x, truth = x.detach().double(), truth.detach()
    return torch.where(x == truth, 0.0, (x - truth).abs())  # where: equal infinities differ by NaN


def guarded(x: Tensor) -> Tensor:
    """Copy of `x` whose storage is followed by NaNs, so a read past the end poisons the result."""
    tail = torch.full((64,), float("nan"), dtype=x.dtype, device=x.device)
    return torch.cat([x.flatten(), tail])[: x.numel()].view(x.shape)
