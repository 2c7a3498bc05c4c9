"""`linear` is torch's own, only sooner: forward and gradients against float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastppo_kernels import linear
from numerics import assert_as_accurate


def run(fn, x, weight, bias, upstream):
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    out = fn(leaves[0], leaves[1], leaves[2] if bias is not None else None)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 5, 3), (7, 32, 48), (2, 9, 64, 33)], ids=str)
def test_matches_float64(shape, with_bias, dtype):
    *rows, H, V = shape
    x, weight = torch.randn(*rows, H, dtype=dtype), torch.randn(V, H, dtype=dtype)
    bias = torch.randn(V, dtype=dtype) if with_bias else None
    upstream = torch.randn(*rows, V)
    truth = run(F.linear, x.double(), weight.double(), None if bias is None else bias.double(), upstream)
    base = run(F.linear, x, weight, bias, upstream)
    for name, a, b, t in zip(
        ["y", "dx", "dW", "db"], run(linear, x, weight, bias, upstream), base, truth, strict=False
    ):
        assert a.dtype == dtype
        assert_as_accurate(name, a, b, t, atol=1e-5)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_no_gradient_where_none_is_wanted(frozen):
    x, weight = torch.randn(4, 8, requires_grad=frozen != "x"), torch.randn(6, 8, requires_grad=frozen != "weight")
    linear(x, weight).sum().backward()
    assert (x.grad is None) == (frozen == "x") and (weight.grad is None) == (frozen == "weight")


def test_an_expanded_upstream_gradient_and_a_strided_input():
    x = torch.randn(8, 12).T.requires_grad_()
    weight = torch.randn(5, 8, requires_grad=True)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(12, 8))
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(5, 8))


def test_a_gradient_can_be_differentiated_again():
    given = [torch.randn(shape) for shape in ((4, 8), (6, 8), (6,))]

    def penalty(fn, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in given]
        gradients = torch.autograd.grad(fn(*leaves).pow(3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(torch.stack([g.square().sum() for g in gradients]).sum(), leaves)

    made = penalty(linear, torch.float32), penalty(F.linear, torch.float32), penalty(F.linear, torch.float64)
    for name, ours, theirs, truth in zip(("x", "weight", "bias"), *made, strict=True):
        assert_as_accurate(name, ours, theirs, truth)


def test_autocast_is_obeyed():
    x, weight = torch.randn(4, 8), torch.randn(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_dtypes_that_differ_are_named():
    with pytest.raises(RuntimeError, match="same dtype"):
        linear(torch.randn(2, 4), torch.randn(3, 4).bfloat16())


def test_no_rows_give_no_rows():
    weight = torch.randn(3, 4, requires_grad=True)
    out = linear(torch.randn(0, 4), weight)
    out.sum().backward()
    assert out.shape == (0, 3) and weight.grad is not None and not weight.grad.any()


def test_a_wrong_width_is_named():
    with pytest.raises(ValueError, match=r"weight must have shape \(V, H\) = \(3, 5\), got \(3, 4\)"):
        linear(torch.randn(2, 5), torch.randn(3, 4))


@pytest.mark.parametrize("away", ["weight", "bias"])
def test_an_operand_on_another_device_is_named(away):
    given = {"weight": torch.randn(3, 5), "bias": torch.randn(3)}
    with pytest.raises(ValueError, match=f"{away} must lie on the device of x, cpu, got meta"):
        linear(torch.randn(2, 5), **(given | {away: given[away].to("meta")}))


@pytest.mark.parametrize("shape", [(), (1,), (16, 1), (1, 20), (16, 20)], ids=str)
@pytest.mark.parametrize("rows", [3, 16])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_bias_of_another_shape_means_what_it_means_to_pytorch(shape, rows, gradients):
    x, weight, bias = torch.randn(rows, 8), torch.randn(20, 8), torch.randn(shape)
    with torch.set_grad_enabled(gradients):
        try:
            wanted = torch.nn.functional.linear(x, weight, bias)
        except RuntimeError:
            with pytest.raises(RuntimeError):
                linear(x, weight, bias)
        else:
            torch.testing.assert_close(linear(x, weight, bias), wanted)


def test_a_weight_of_no_rows_gives_no_columns():
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(0, 8, requires_grad=True)
    made = linear(x, weight)
    dx, dweight = torch.autograd.grad(made.sum(), (x, weight))
    assert made.shape == (3, 0) and not dx.any() and dweight.shape == (0, 8)


@pytest.mark.parametrize("shape", [(768, 96), (96, 768), (64, 1000)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_bits_of_a_row_do_not_depend_on_how_many_there_are(shape, with_bias):
    """On a CPU."""
    (width, out), rows = shape, 40
    x, weight, bias = torch.randn(rows, width), torch.randn(out, width), torch.randn(out) if with_bias else None
    whole = linear(x, weight, bias)
    for n in range(1, rows):
        made = linear(x[:n], weight, bias)
        assert made.is_contiguous() and torch.equal(made, whole[:n]), n


@pytest.mark.parametrize("rows", [1, 2, 3, 15, 16, 17, 31, 32, 33, 100])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_bits_are_the_same_with_and_without_gradients_and_for_every_shape_of_the_rows(rows, with_bias):
    """Scoring and training meet: a ratio of 1, not of 1.0000001."""
    x, weight = torch.randn(rows, 96), torch.randn(200, 96, requires_grad=True)
    bias = torch.randn(200) if with_bias else None
    learning = linear(x, weight, bias)
    with torch.no_grad():
        for shape in [(rows,), (1, rows), (rows, 1)]:
            made = linear(x.view(*shape, 96), weight, bias)
            assert made.shape == (*shape, 200) and torch.equal(made.view(rows, 200), learning)
    assert learning.requires_grad


@pytest.mark.filterwarnings("ignore")  # of shapes that are taken for constants
def test_a_trace_computes_what_it_was_made_of() -> None:
    x, weight = torch.randn(4, 6), torch.randn(3, 6)
    with torch.no_grad():
        traced: Any = torch.jit.trace(lambda x: linear(x, weight), (x,), check_trace=False)
        assert torch.equal(traced(2 * x), linear(2 * x, weight))
