"""Laws of token_logprobs and logits_token_logprobs."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastppo_kernels import logits_token_logprobs, reference, token_logprobs
from fastppo_kernels.settings import HeadSettings
from numerics import DEVICE, assert_as_accurate, guarded

FLAGS = st.fixed_dictionaries(
    {"temperature": st.sampled_from([1.0, 0.6, 2.0]), "softcap": st.sampled_from([None, 3.0])}
)


def problem(R: int, H: int, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden, weight, bias, targets) with log-probs of a few nats."""
    shapes = ((R, H), (V, H), (V,))
    made = (torch.randn(s, device=DEVICE) * (2.0 if len(s) == 1 else 3.0 / math.sqrt(H) ** 0.5) for s in shapes)
    hidden, weight, bias = (guarded(x.to(dtype)) for x in made)
    return hidden, weight, bias, torch.randint(V, (R,), device=DEVICE)


def run(op: Any, tensors: list[Tensor], grads: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Outputs of op(*tensors) = (logprobs, entropy), then the gradients of all tensors."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    logprobs, entropy = op(*leaves)
    loss = (logprobs * grads[0].to(logprobs)).sum() + (entropy * grads[1].to(entropy)).sum()
    return [logprobs.detach(), entropy.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("R", [0, 1, 3, 63])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.6, None), (0.8, 5.0)])
def test_values_and_gradients_are_those_of_float64(
    R: int, dtype: torch.dtype, temperature: float, softcap: float | None
) -> None:
    hidden, weight, bias, targets = problem(R, 32, 997, dtype)
    head, grads = HeadSettings(temperature=temperature, softcap=softcap), (torch.randn(R), torch.randn(R))
    kwargs = {"temperature": temperature, "softcap": softcap, "return_entropy": True, "chunk_size": 16}
    ours = run(lambda h, w, b: token_logprobs(h, w, targets, bias=b, **kwargs), [hidden, weight, bias], grads)
    plain = lambda h, w, b: reference.token_logprobs(h, w, targets, head, bias=b)  # noqa: E731
    baseline = run(plain, [hidden, weight, bias], grads)
    truth = run(plain, [hidden.double(), weight.double(), bias.double()], grads)
    names = ("logprobs", "entropy", "dhidden", "dweight", "dbias")
    for name, a, b, t in zip(names, ours, baseline, truth, strict=True):
        assert_as_accurate(name, a, b, t, atol=1e-6)


@pytest.mark.parametrize("V", [1, 2, 129, 1000])
def test_probabilities_of_all_tokens_sum_to_one(V: int) -> None:
    hidden, weight, bias, _ = problem(1, 16, V, torch.float32)
    logprobs, entropy = token_logprobs(
        hidden.expand(V, -1), weight, torch.arange(V, device=DEVICE), bias=bias, return_entropy=True, temperature=0.7
    )
    assert torch.allclose(logprobs.double().exp().sum(), torch.ones((), dtype=torch.float64), atol=1e-5)
    assert torch.allclose(-(logprobs.exp() * logprobs).sum(), entropy[0], atol=1e-5)


def test_uniform_logits_have_the_entropy_of_the_vocabulary() -> None:
    logits = torch.zeros(2, 1000)
    logprobs, entropy = logits_token_logprobs(logits, torch.tensor([0, 999]), return_entropy=True)
    assert torch.allclose(logprobs, torch.full((2,), -math.log(1000)))
    assert torch.allclose(entropy, torch.full((2,), math.log(1000)))


def test_temperature_divides_the_logits() -> None:
    """log-probs at T are those of the sampler's softmax(z / T), also with a soft-cap, which comes first."""
    hidden, weight, _, targets = problem(5, 16, 50, torch.float64)
    for softcap in (None, 2.0):
        z = hidden @ weight.T
        z = z if softcap is None else softcap * (z / softcap).tanh()
        expected = (z / 0.6).softmax(-1)[torch.arange(5), targets].log()
        assert torch.allclose(token_logprobs(hidden, weight, targets, temperature=0.6, softcap=softcap), expected)


@settings(max_examples=12)
@given(flags=FLAGS, with_bias=st.booleans(), chunk_size=st.sampled_from([1, 2, 64]), wanted=st.integers(1, 7))
def test_gradcheck_of_token_logprobs(flags: dict[str, Any], with_bias: bool, chunk_size: int, wanted: int) -> None:
    """Gradients of log-prob and entropy for every subset of inputs that wants one."""
    hidden, weight, bias, targets = problem(3, 4, 7, torch.float64)
    for i, x in enumerate((hidden, weight, bias)):
        x.requires_grad_(bool(wanted >> i & 1))
    if not (hidden.requires_grad or weight.requires_grad or with_bias):
        hidden.requires_grad_()

    if not with_bias:
        bias.requires_grad_(False)

    def op(h: Tensor, w: Tensor, b: Tensor) -> Any:
        b_or_none = b if with_bias else None
        return token_logprobs(h, w, targets, bias=b_or_none, return_entropy=True, chunk_size=chunk_size, **flags)

    assert torch.autograd.gradcheck(op, (hidden, weight, bias), fast_mode=True)


@settings(max_examples=6)
@given(flags=FLAGS)
def test_gradcheck_of_logits_token_logprobs(flags: dict[str, Any]) -> None:
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 4, 2])
    assert torch.autograd.gradcheck(lambda z: logits_token_logprobs(z, targets, return_entropy=True, **flags), logits)


@pytest.mark.parametrize("grad", ["strided", "expanded"])
def test_upstream_gradient_may_have_any_strides(grad: str) -> None:
    hidden, weight, _, targets = problem(9, 8, 33, torch.float64)
    g = torch.randn(18, dtype=torch.float64)[::2] if grad == "strided" else torch.tensor(1.5).double().expand(9)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    made = torch.autograd.grad(token_logprobs(h, w, targets, chunk_size=4), (h, w), g)
    plain = reference.token_logprobs(h, w, targets, HeadSettings(), entropy=False)[0]
    for a, b in zip(made, torch.autograd.grad(plain, (h, w), g.contiguous()), strict=True):
        assert torch.allclose(a, b)


def test_only_the_entropy_can_be_differentiated() -> None:
    hidden, weight, _, targets = problem(4, 8, 33, torch.float64)
    hidden.requires_grad_()
    ours = torch.autograd.grad(token_logprobs(hidden, weight, targets, return_entropy=True)[1].sum(), hidden)
    plain = reference.token_logprobs(hidden, weight, targets, HeadSettings())[1]
    assert plain is not None
    assert torch.allclose(ours[0], torch.autograd.grad(plain.sum(), hidden)[0])


@pytest.mark.parametrize("offset", [1e4, -1e4, 1e6])
def test_common_offset_of_the_logits_changes_nothing(offset: float) -> None:
    """Integer logits, so that the shifted ones are exact in float32: then the log-probs must be the same too."""
    logits = torch.randint(-8, 8, (6, 41)).float()
    targets = torch.randint(41, (6,))
    expected = logits_token_logprobs(logits, targets)
    assert torch.allclose(logits_token_logprobs(logits + offset, targets), expected, atol=1e-6)
    eye, bias = torch.eye(41), torch.full((41,), offset)
    shifted = token_logprobs(logits, eye, targets, bias=bias, return_entropy=True)
    still = token_logprobs(logits, eye, targets, return_entropy=True)
    for a, b in zip(shifted, still, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("padding", [-math.inf, -1e30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_padded_vocabulary_columns_do_not_exist(padding: float, dtype: torch.dtype) -> None:
    hidden, weight, _, targets = problem(5, 8, 40, dtype)  # 5 rows: in float32 and bfloat16 a CPU adds three
    bias = torch.zeros(40, dtype=dtype)
    bias[30:] = padding
    targets = targets % 30
    grads = (torch.randn(5), torch.randn(5))
    wide = run(lambda h, w: token_logprobs(h, w, targets, bias=bias, return_entropy=True), [hidden, weight], grads)
    narrow = run(lambda h, w: token_logprobs(h, w, targets, return_entropy=True), [hidden, weight[:30]], grads)
    for name, a, b in zip(("logprobs", "entropy", "dhidden", "dweight"), wide, narrow, strict=True):
        assert torch.allclose(a[:30].double(), b.double(), rtol=10 * torch.finfo(dtype).eps, atol=1e-6), name
    assert wide[3][30:].eq(0).all()
    logits = (hidden @ weight.T + bias).requires_grad_()
    _, entropy = logits_token_logprobs(logits, targets, return_entropy=True)
    assert torch.autograd.grad(entropy.sum(), logits)[0].isfinite().all()


def test_tiny_probability_keeps_its_log() -> None:
    """A target whose probability underflows in float32 still has the right, finite log-prob."""
    logits = torch.tensor([[0.0, -500.0, 1.0]])
    expected = -500.0 - math.log(1 + math.e)
    for made in (
        logits_token_logprobs(logits, torch.tensor([1])),
        token_logprobs(logits, torch.eye(3), torch.tensor([1])),
    ):
        assert made.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_chunk_size_changes_nothing(dtype: torch.dtype) -> None:
    hidden, weight, bias, targets = problem(21, 8, 65, dtype)
    grads = (torch.randn(21), torch.randn(21))
    made = [
        run(
            lambda h, w, b, c=c: token_logprobs(h, w, targets, bias=b, return_entropy=True, chunk_size=c),
            [hidden, weight, bias],
            grads,
        )
        for c in (1, 4, 8, 10, 16, 21, None)
    ]
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for other in made[1:]:
        assert all(torch.allclose(a, b, rtol=rtol, atol=rtol / 10) for a, b in zip(made[0], other, strict=True))


class Allocations(TorchDispatchMode):
    """Records the shape of every tensor any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.shapes += [tuple(x.shape) for x in tree_leaves(out) if isinstance(x, Tensor)]
        return out


def test_no_row_by_vocabulary_tensor_and_no_work_for_a_frozen_weight() -> None:
    R, H, V = 24, 8, 100
    hidden, weight, _, targets = problem(R, H, V, torch.float32)
    with Allocations() as seen:
        token_logprobs(hidden.requires_grad_(), weight, targets, chunk_size=8, return_entropy=True)[0].sum().backward()
    assert max(math.prod(shape) for shape in seen.shapes) <= max(8 * V, H * V)
    assert sum(shape == (V, H) for shape in seen.shapes) <= 4  # the weight itself, passed through; no gradient of it
    assert weight.grad is None
    with Allocations() as seen:
        token_logprobs(hidden, weight.requires_grad_(), targets, chunk_size=8)[0].sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_without_gradients_nothing_is_kept() -> None:
    hidden, weight, _, targets = problem(3, 8, 20, torch.float32)
    with torch.no_grad():
        logprobs = token_logprobs(hidden.requires_grad_(), weight.requires_grad_(), targets)
    assert logprobs.grad_fn is None


def test_autocast_does_not_reach_the_maths() -> None:
    hidden, weight, _, targets = problem(6, 16, 50, torch.float32)
    expected = token_logprobs(hidden, weight, targets)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(token_logprobs(hidden, weight, targets), expected)


def test_bfloat16_hidden_gives_float32_log_probs() -> None:
    """Rounding the logits to bfloat16 would move log-probs by 1e-2; what is left here is the rounding of float32."""
    hidden, weight, _, targets = problem(64, 64, 500, torch.bfloat16)
    made = token_logprobs(hidden, weight, targets)
    truth = token_logprobs(hidden.double(), weight.double(), targets)
    assert made.dtype == torch.float32
    assert (made - truth).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(3, dtype=torch.int32)}, "targets must be int64"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, r"targets must have shape \(R,\) = \(3,\), got \(4,\)"),
        ({"weight": torch.zeros(5, 3)}, r"hidden must be \(R, H\) and weight \(V, H\)"),
        ({"hidden": torch.zeros(3, 2, 4)}, r"flatten hidden"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.int64)}, "hidden must be a floating-point tensor"),
        ({"bias": torch.zeros(4)}, r"bias must have shape \(V,\) = \(5,\)"),
        ({"temperature": 0.0}, r"temperature must be finite and > 0, got 0.0; the greedy limit is .*top_k=1"),
        ({"softcap": -1.0}, "softcap must be finite and > 0"),
        ({"chunk_size": 0}, "chunk_size must be >= 1"),
        ({"backend": "cuda"}, "backend = 'cuda' does not exist for token_logprobs on .*; available: "),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4)}
    arguments |= {"targets": torch.zeros(3, dtype=torch.int64)} | change
    with pytest.raises(ValueError, match=message):
        token_logprobs(arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("targets"), **arguments)


def test_environment_chooses_the_backend_and_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPPO_BACKEND", "fast")
    with pytest.raises(ValueError, match="FASTPPO_BACKEND = 'fast' does not exist for logits_token_logprobs"):
        logits_token_logprobs(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))
