"""Laws of how a gradient that was made along with the loss meets grad_output, and of the memory that takes."""

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.profiler import profile

from fastppo_kernels import (
    gae,
    linear_ppo_loss,
    linear_value_loss,
    logits_ppo_loss,
    logits_token_logprobs,
    ppo_loss,
    sample,
    token_logprobs,
    token_rewards,
    value_loss,
    whiten,
)
from fastppo_kernels.head import TILE_BYTES
from numerics import DEVICE

R, H, V = 6, 16, 33
BACKENDS = ["triton"] if DEVICE == "cuda" else ["reference", "triton"]  # on the CPU triton is interpreted
SIGNALLING_NAN = {torch.float32: (torch.int32, 0x7F800001), torch.bfloat16: (torch.int16, 0x7F81)}


def scale_(backend: str, x: Tensor, factor: float) -> None:
    module = importlib.import_module({"reference": "fastppo_kernels.eager", "triton": "fastppo_kernels.gpu"}[backend])
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    module.scale_(x, torch.tensor(factor, dtype=dtype, device=x.device))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (3, 7), (0, 4), (2, 4097)], ids=str)
def test_every_element_is_scaled_with_one_rounding(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    x = torch.randn(shape, device=DEVICE).to(dtype)
    expected = (x.double() * torch.tensor(1 / 3, dtype=torch.promote_types(dtype, torch.float32)).double()).to(dtype)
    scale_(backend, x, 1 / 3)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_padding_between_rows_is_left_alone(backend: str) -> None:
    whole = torch.ones(4, 10, device=DEVICE)
    scale_(backend, whole[:, 2:7], 3.0)
    assert whole[:, 2:7].eq(3).all() and whole.sum() == 40 + 2 * 20
    scale_(backend, whole.T[2:7], 2.0)
    assert whole[:, 2:7].eq(6).all() and whole.sum() == 40 + 5 * 20


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", list(SIGNALLING_NAN), ids=str)
def test_one_touches_nothing(dtype: torch.dtype, backend: str) -> None:
    """Any arithmetic would quiet a signalling NaN."""
    bits, pattern = SIGNALLING_NAN[dtype]
    x = torch.full((3, 5), pattern, dtype=bits, device=DEVICE).view(dtype)
    scale_(backend, x, 1.0)
    assert x.view(bits).eq(pattern).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [0.0, math.nan, -math.inf])
def test_what_is_not_one_is_applied(factor: float, backend: str) -> None:
    x = torch.ones(3, device=DEVICE)
    scale_(backend, x, factor)
    assert torch.equal(x.nan_to_num(7.0), torch.full_like(x, factor).nan_to_num(7.0))


Fused = tuple[Callable[..., Tensor], list[Tensor]]


def fused(dtype: torch.dtype) -> dict[str, Fused]:
    """Losses that make their gradient in the forward, as functions of what is differentiated."""
    y, row = torch.randint(V, (R,), device=DEVICE), torch.randn(R, device=DEVICE)
    like = {"old_logprobs": None, "advantages": row, "weights": row.abs() + 0.1}
    critic = (row, row + 1.0, row.abs() + 0.1)
    z, h, w, head = (torch.randn(s, device=DEVICE).to(dtype) for s in ((R, V), (R, H), (V, H), (H,)))
    return {
        "logits, in place": (lambda z: logits_ppo_loss(z * 1, y, **like)[0], [z]),
        "logits": (lambda z: logits_ppo_loss(z, y, **like, inplace=False)[0], [z]),
        "linear": (lambda h, w: linear_ppo_loss(h, w, y, **like)[0], [h, w]),
        "linear value": (lambda h, w: linear_value_loss(h, w, None, *critic)[0], [h, head]),
        "linear value, head only": (lambda w: linear_value_loss(h, w, None, *critic)[0], [head]),
    }


@pytest.mark.parametrize("name", list(fused(torch.float32)))
def test_gradients_in_bfloat16_meet_grad_output_in_float32(name: str) -> None:
    """bfloat16(1 / 3) is 1.0013 / 3: rounded first, it would make every gradient larger."""
    function, inputs = fused(torch.bfloat16)[name]
    leaves = [x.requires_grad_() for x in inputs]
    once = torch.autograd.grad(function(*leaves), leaves)
    for a, b in zip(once, torch.autograd.grad(function(*leaves) / 3, leaves), strict=True):
        assert torch.equal(b, (a.float() * torch.tensor(1 / 3)).bfloat16()) and a.any()


@pytest.mark.parametrize("name", list(fused(torch.float32))[1:])
def test_gradients_add_up_however_often_a_kept_graph_is_differentiated(name: str) -> None:
    """None is scaled twice, and what accumulates in a leaf's .grad is not what the next backward starts from."""
    function, inputs = fused(torch.float32)[name]
    leaves = [x.requires_grad_() for x in inputs]
    once = torch.autograd.grad(function(*leaves), leaves)
    loss = function(*leaves)
    for factor in (1.0, 4.0, 1.0):
        (loss * factor).backward(retain_graph=True)
    loss.backward()
    for x, gradient in zip(leaves, once, strict=True):
        torch.testing.assert_close(x.grad, 7 * gradient)


def test_a_gradient_that_would_underflow_in_float16_is_refused() -> None:
    for name, (function, inputs) in fused(torch.float16).items():
        assert function(*inputs).isfinite()  # without a gradient it may be float16
        with pytest.raises(ValueError, match=r"before a loss scale .* torch.float16; use bfloat16 or float32"):
            function(*[x.detach().requires_grad_() for x in inputs])
            pytest.fail(name)


def test_what_is_advised_in_float16_survives_a_loss_scale() -> None:
    """Weights of 1e-5 (100k tokens), GradScaler's 65536: gradients of float16 logits as accurate as float16 is."""
    z, y = torch.randn(8, 1000, device=DEVICE).half().requires_grad_(), torch.arange(8, device=DEVICE)
    advantages, weights = torch.randn(8, device=DEVICE), torch.full((8,), 1e-5, device=DEVICE)

    def gradient(z: Tensor) -> Tensor:
        loss, _ = ppo_loss(logits_token_logprobs(z, y), None, advantages.to(z.device), weights)
        return torch.autograd.grad(65536.0 * loss, z)[0].double()

    truth = gradient(z.detach().double().requires_grad_())
    assert (gradient(z) - truth).abs().sum() <= 2e-3 * truth.abs().sum()


def peak_bytes(call: Callable[[], Any]) -> tuple[int, Any]:
    """(most bytes of tensors that were alive at a time above those before, what the call returned); CPU only."""
    recording: Any = profile(profile_memory=True, use_kineto=True)
    with recording as prof:
        made = call()
    recorded = prof.kineto_results
    events = [event for event in recorded.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak, made


@pytest.mark.skipif(DEVICE != "cpu", reason="counts what the CPU's allocator hands out")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("H", [128, 400])  # a bfloat16 gradient smaller, and larger, than a chunk's logits
def test_linear_ppo_loss_needs_one_chunk_and_its_gradients(dtype: torch.dtype, H: int) -> None:
    """In float32 whatever the inputs are: bfloat16 is converted by the tile, its gradient rounded in place."""
    R, V, chunk = 512, 40000, 128
    h, w = torch.randn(R, H).to(dtype).requires_grad_(), torch.randn(V, H).to(dtype).requires_grad_()
    y, ones = torch.randint(V, (R,)), torch.ones(R)
    peak, loss = peak_bytes(lambda: linear_ppo_loss(h, w, y, None, ones, ones / R, chunk_size=chunk)[0])
    assert peak <= 4 * chunk * V + 4 * (R + V) * H + 2 * TILE_BYTES
    peak, _ = peak_bytes(lambda: torch.autograd.grad(3.0 * loss, (h, w)))
    assert peak < 1024


@pytest.mark.skipif(DEVICE != "cpu", reason="counts what the CPU's allocator hands out")
def test_a_value_head_trained_alone_needs_no_gradient_of_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("fastppo_kernels.operators.value")
    monkeypatch.setattr(module, "SCRATCH_ROWS", 64)
    hidden, weight, row = torch.randn(1000, 256), torch.randn(256, requires_grad=True), torch.randn(1000)
    peak, loss = peak_bytes(lambda: linear_value_loss(hidden, weight, None, row, row + 1, row.abs())[0])
    assert peak < 4 * 1000 * 256 // 2
    both = linear_value_loss(hidden.clone().requires_grad_(), weight, None, row, row + 1, row.abs())[0]
    assert torch.equal(loss, both)
    gradients = [torch.autograd.grad(x, weight)[0] for x in (loss, both)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-4)


def on_two_devices() -> dict[str, Callable[[], Any]]:
    """Calls of every public op with one tensor elsewhere."""
    a, far = torch.ones(3, device=DEVICE), torch.ones(3, device="meta")
    y, z = torch.zeros(3, dtype=torch.int64, device=DEVICE), torch.ones(3, 4, device=DEVICE)
    w, cu = torch.ones(5, 4, device=DEVICE), torch.tensor([0, 3], dtype=torch.int32, device=DEVICE)
    return {
        "targets": lambda: token_logprobs(z, w, y.to("meta")),
        "weight": lambda: token_logprobs(z, w.to("meta"), y),
        "targets of logits": lambda: logits_token_logprobs(z, y.to("meta")),
        "weights": lambda: ppo_loss(a, a, a, far),
        "old_logprobs": lambda: logits_ppo_loss(z, y, far, a, a),
        "advantages": lambda: linear_ppo_loss(z, w, y, a, far, a),
        "returns": lambda: value_loss(a, a, far, a),
        "old_values": lambda: linear_value_loss(z, z[0], None, far, a, a),
        "cu_seqlens": lambda: gae(a, a, cu.to("meta")),
        "ref_logprobs": lambda: token_rewards(a, a, far, cu, kl_coef=0.1),
        "mask": lambda: whiten(a, far.bool()),
        "uniform": lambda: sample(z, far),
    }


@pytest.mark.parametrize("name", list(on_two_devices()))
def test_tensors_on_two_devices_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name.split()[0]} must lie on the device of .*got meta; move it"):
        on_two_devices()[name]()
