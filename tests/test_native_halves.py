"""Laws of the float32 sum in two halves: the bits of a plain float32 sum, and of its rounding by PyTorch."""

import pytest
import torch

from fastppo_kernels.native.halves import HalvedSum
from native_rows import assert_same_bits, on_threads
from numerics import DEVICE

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the CPU's")


def sums(addends: list[torch.Tensor], rows: list[slice]) -> tuple[HalvedSum, torch.Tensor]:
    halved, plain = HalvedSum(300, 70), torch.zeros(300, 70)
    for some, addend in zip(rows, addends, strict=True):
        halved.add(some, addend)
        plain[some] += addend
    return halved, plain


def test_a_halved_sum_has_the_bits_of_a_float32_sum() -> None:
    rows = [slice(0, 300), slice(0, 64), slice(64, 300), slice(299, 300), slice(5, 5)]
    scales = 10.0 ** torch.randint(-40, 38, (len(rows),)).float()
    addends = [scale * torch.randn(300, 70)[some] for scale, some in zip(scales, rows, strict=True)]

    def made() -> list[torch.Tensor]:
        halved, plain = sums(addends, rows)
        joined = (halved.upper.view(torch.int16).int() << 16 | halved.lower.int() & 0xFFFF).view(torch.float32)
        assert torch.equal(joined, plain)
        rounded = halved.rounded()
        assert torch.equal(rounded.view(torch.int16), plain.bfloat16().view(torch.int16))
        return [rounded]

    assert_same_bits(on_threads(made))


def test_ties_infinities_nan_and_the_largest_are_rounded_to_even() -> None:
    bits = torch.tensor(
        [0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FFFFFFF]
    )
    bits = torch.cat([bits, bits | 1 << 31, torch.tensor([0, 1 << 31, 1, 0x8000, 0x18000])])
    values = bits.to(torch.uint32).view(torch.float32).reshape(1, -1)
    halved = HalvedSum(*values.shape)
    halved.upper.copy_(values.view(torch.bfloat16)[:, 1::2])
    halved.lower.copy_(values.view(torch.int16)[:, ::2])
    made, truth = halved.rounded(), values.bfloat16()
    assert torch.equal(made.isnan(), truth.isnan())
    assert torch.equal(made.view(torch.int16)[~truth.isnan()], truth.view(torch.int16)[~truth.isnan()])


def test_a_rounded_sum_owns_two_bytes_an_element() -> None:
    halved, _ = sums([torch.ones(300, 70)], [slice(0, 300)])
    made = halved.rounded()
    assert made.is_contiguous() and made.untyped_storage().nbytes() == 2 * made.numel()
    assert not hasattr(halved, "lower")
