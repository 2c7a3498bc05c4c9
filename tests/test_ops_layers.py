"""Laws of the CPU's norms, gated activations and rotary positions, on every instruction set."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastppo_kernels import layers
from fastppo_kernels.native import isa as isas
from numerics import assert_as_accurate, guarded

WIDTHS = [3, 7, 16, 128, 150, 4097]
ROWS = [1, 5, 127, 128, 300]  # below, at and above what a thread adds up


@pytest.fixture(params=isas.available_isas(), autouse=True)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(isas.ISA_VARIABLE, request.param)
    return request.param


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-b, a], dim=-1) * sin[:, None]


def fake(*shape: int) -> Tensor:
    with FakeTensorMode():
        return torch.zeros(shape)


def passes(function: Callable[..., Tensor], inputs: list[Tensor], dout: Tensor, learns: int) -> dict[str, Tensor]:
    """Result, and gradients of the first `learns` inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    grads = torch.autograd.grad(out, inputs[:learns], dout)
    return {"out": out.detach(), **{f"gradient {i}": x for i, x in enumerate(grads)}}


def assert_right(made: Any, plain: Any, *inputs: Tensor, learns: int) -> None:
    dout = torch.randn(plain(*inputs).shape)
    found, rough = (passes(f, [guarded(x) for x in inputs], dout, learns) for f in (made, plain))
    with torch.no_grad():
        assert torch.equal(made(*inputs), found["out"])
    exact = passes(plain, [x.double() for x in inputs], dout.double(), learns)
    for name, x in found.items():
        assert_as_accurate(name, x, rough[name], exact[name])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_a_norm_is_its_formula(rows: int, width: int) -> None:
    x, weight = 3 * torch.randn(rows, width), torch.randn(width)
    assert_right(lambda x, w: layers.rms_norm(x, w, 1e-6), rms_norm, x, weight, learns=2)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (2, 3, 128), (300, 513)])
def test_a_gated_activation_is_its_formula(shape: tuple[int, ...]) -> None:
    assert_right(layers.gated, gated, 4 * torch.randn(shape), torch.randn(shape), learns=2)


@pytest.mark.parametrize(("rows", "heads", "width"), [(1, 1, 2), (5, 3, 10), (64, 4, 32), (300, 14, 64), (7, 2, 80)])
def test_a_rotation_is_its_formula(rows: int, heads: int, width: int) -> None:
    x, (cos, sin) = torch.randn(rows, heads, width), torch.randn(2, rows, width)  # the halves of angles may differ
    assert_right(layers.rotate, rotate, x, cos, sin, learns=1)


def test_gates_of_any_size_neither_overflow_nor_vanish() -> None:
    gate = torch.tensor([0.0, -0.0, 88.0, -88.0, 200.0, -200.0, 1e38, -1e38, 1e-30, -1e-30])
    out = layers.gated(gate.requires_grad_(), torch.ones(10))
    torch.testing.assert_close(out, F.silu(gate.double()).float(), rtol=1e-6, atol=1e-36)
    (slope,) = torch.autograd.grad(out.sum(), gate)
    assert slope.tolist() == pytest.approx([0.5, 0.5, 1, 0, 1, 0, 1, 0, 0.5, 0.5], abs=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows_in_its_own_row(value: float) -> None:
    x = torch.randn(3, 40)
    x[1, 5] = value
    for out in (layers.rms_norm(x, torch.ones(40), 1e-6), layers.gated(x, -x)):
        assert not out[1].isfinite().all() and out[0].isfinite().all() and out[2].isfinite().all()


def test_rows_and_heads_may_lie_anywhere_in_memory() -> None:
    x, (cos, sin) = torch.randn(6, 4, 16), torch.randn(2, 6, 16)
    expected = layers.rotate(x, cos, sin)
    for other in (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat([x, x], dim=1)[:, :4],
        torch.stack([x, x], -1)[..., 0],
    ):
        assert torch.equal(layers.rotate(other, cos, sin), expected)
    wide = torch.randn(6, 32)
    assert torch.equal(
        layers.rms_norm(wide[:, ::2], torch.ones(16), 1e-6), layers.rms_norm(wide[:, ::2].clone(), torch.ones(16), 1e-6)
    )
    assert torch.equal(
        layers.gated(wide[:, ::2], wide[:, 1::2]), layers.gated(wide[:, ::2].clone(), wide[:, 1::2].clone())
    )


@pytest.mark.parametrize("weight", [torch.randn(32)[::2], torch.randn(1).expand(16)], ids=["strided", "expanded"])
def test_weights_may_lie_anywhere_in_memory(weight: Tensor) -> None:
    x = torch.randn(6, 16)
    one, other = (passes(lambda x, w: layers.rms_norm(x, w, 1e-6), [x, w], x, 2) for w in (weight, weight.clone()))
    assert all(torch.equal(one[name], other[name]) for name in one)
    with torch.no_grad():
        assert torch.equal(layers.rms_norm(x, weight, 1e-6), other["out"])


def test_the_number_of_threads_changes_nothing() -> None:
    x, weight, threads, made = torch.randn(1000, 130), torch.randn(130), torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            made.append(passes(lambda x, w: layers.rms_norm(x, w, 1e-6), [x, weight], x, 2))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, made[0][name]) for one in made for name, x in one.items())


def test_nothing_to_do() -> None:
    assert layers.rms_norm(torch.zeros(0, 4), torch.ones(4), 1e-6).shape == (0, 4)
    assert layers.gated(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 4)
    assert layers.rotate(torch.zeros(0, 2, 4), torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 2, 4)


def test_they_are_differentiated_once() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(layers.gated(x, x).sum(), x, create_graph=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layers.rms_norm(torch.zeros(2, 4), torch.ones(5), 1e-6), "weight must have shape"),
        (lambda: layers.rms_norm(torch.zeros(2, 4).double(), torch.ones(4), 1e-6), "x must be a float32"),
        (lambda: layers.rms_norm(fake(2, 4), torch.ones(4), 1e-6), "x must be a float32 tensor .* FakeTensor"),
        (lambda: layers.gated(torch.zeros(2, 4), torch.zeros(4)), "up must have shape"),
        (lambda: layers.gated(torch.zeros(2), torch.zeros(2).bfloat16()), "up must be a float32"),
        (lambda: layers.rotate(torch.zeros(2, 1, 3), torch.zeros(2, 3), torch.zeros(2, 3)), "even D"),
        (lambda: layers.rotate(torch.zeros(2, 1, 4), torch.zeros(2, 4), torch.zeros(1, 4)), "sin must have shape"),
    ],
)
def test_bad_input_says_what_is_wrong(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
