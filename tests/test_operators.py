"""The operators of torch.library: their registrations hold, and torch.compile takes the public functions whole."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastppo_kernels import (
    gae,
    linear,
    linear_ppo_loss,
    linear_value_loss,
    logits_ppo_loss,
    logits_token_logprobs,
    operators,
    ppo_loss,
    sample,
    token_logprobs,
    token_rewards,
    value_loss,
    whiten,
)
from fastppo_kernels.backend import available
from fastppo_kernels.settings import PPOSettings
from numerics import DEVICE

R, H, V = 6, 8, 11
BACKENDS = available(torch.zeros(1, device=DEVICE))[:2]  # the fast one and the reference
SETTINGS = PPOSettings(kl_coef=0.1, entropy_coef=0.05, dual_clip=3.0).encoded()


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()


def row() -> Tensor:
    return -torch.rand(R, device=DEVICE)


def targets() -> Tensor:
    return torch.randint(V, (R,), device=DEVICE)


def packed() -> Tensor:
    return torch.tensor([0, 2, R], dtype=torch.int32, device=DEVICE)


def weights() -> Tensor:
    return torch.tensor([0.5, 0.0, 0.2, 0.1, 0.1, 0.1], device=DEVICE)


def cases(backend: str, dtype: torch.dtype = torch.float32) -> list[tuple[Any, tuple[Any, ...]]]:
    """Every operator with one set of arguments."""
    rows = (row(), row(), weights(), row(), row())
    head = (0.7, 5.0)
    wanted, nothing = [True, True, True], [False, False, False]
    linear = (targets(), *rows, row(), *head, SETTINGS, True, 4)
    hidden, weight, bias = leaf(R, H, dtype=dtype), leaf(V, H, dtype=dtype), leaf(V, dtype=dtype)
    return [
        (operators.token_logprobs, (hidden, weight, bias, targets(), *head, True, 4, backend)),
        (operators.token_logprobs, (hidden, weight, None, targets(), 1.0, None, False, None, backend)),
        (operators.logits_token_logprobs, (leaf(R, V, dtype=dtype), targets(), *head, True, backend)),
        (operators.ppo_tokens, (leaf(R), leaf(R), *rows, SETTINGS, backend)),
        (operators.logits_ppo, (leaf(R, V, dtype=dtype), targets(), *rows, *head, SETTINGS, True, True, backend)),
        (operators.logits_ppo_, (leaf(R, V).detach(), targets(), *rows, *head, SETTINGS, True, backend)),
        (operators.linear_ppo, (hidden, weight, bias, *linear, wanted, backend)),
        (operators.linear_ppo, (hidden.detach(), weight.detach(), None, *linear, nothing, backend)),
        (operators.value, (leaf(R), row(), row(), weights(), 0.2, backend)),
        (operators.linear_value, (hidden, leaf(H), leaf(1), row(), row(), weights(), 0.2, wanted, backend)),
        (operators.gae, (row(), row(), packed(), 1.0, 0.9, None, None, backend)),
        (operators.token_rewards, (row()[:2], row(), row(), packed(), 0.1, "k1", None, backend)),
        (operators.moments, (row(), None, backend)),
        (operators.scale_, (leaf(R, V, dtype=dtype).detach(), torch.tensor(0.3, device=DEVICE))),
        (operators.sample, (leaf(R, V).detach(), -row(), 0.7, 0, 1.0, backend)),
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", range(len(cases("reference"))))
def test_registrations_hold(case: int, backend: str) -> None:
    """Schema, fake, autograd and ahead-of-time tracing, with fixed and with symbolic shapes."""
    operator, arguments = cases(backend)[case]
    torch.library.opcheck(operator, arguments)


def test_registrations_of_a_product_hold() -> None:
    for a, b, bias in ((leaf(5, 3), leaf(4, 3), None), (leaf(3, 5).T, leaf(4, 6)[:, ::2], leaf(4))):
        given = (a.detach(), b.detach(), None if bias is None else bias.detach())
        torch.library.opcheck(operators.product, given)


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_registrations_hold_for_few_rows(count: int, backend: str) -> None:
    few = (row()[:count] for _ in range(8))
    old, advantages, returns, w, x, entropy, ref, is_weights = few
    leaves = x.requires_grad_(), entropy.requires_grad_()
    torch.library.opcheck(operators.ppo_tokens, (*leaves, old, advantages, w, ref, is_weights, SETTINGS, backend))
    torch.library.opcheck(operators.value, (leaves[0], old, returns, w, 0.2, backend))


def test_registrations_hold_in_bfloat16() -> None:
    for operator, arguments in cases(BACKENDS[0], torch.bfloat16)[:3]:
        torch.library.opcheck(
            operator, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
        )


def rows() -> dict[str, Any]:
    return {"ref_logprobs": row(), "kl_coef": 0.1, "entropy_coef": 0.01}


def compiled_cases() -> dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]]:
    """Public functions as a function of the tensors that are differentiated."""
    y, old, adv, w, more = targets(), row(), row(), weights(), rows()
    return {
        "token_logprobs": (lambda h, W: token_logprobs(h, W, y), (leaf(R, H), leaf(V, H))),
        "logits_token_logprobs": (lambda z: logits_token_logprobs(z, y, return_entropy=True)[1], (leaf(R, V),)),
        "ppo_loss": (lambda x: ppo_loss(x, old, adv, w)[0], (leaf(R),)),
        "logits_ppo_loss": (lambda z: logits_ppo_loss(z * 2, y, old, adv, w, **more)[0], (leaf(R, V),)),
        "logits_ppo_loss apart": (
            lambda z: logits_ppo_loss(z, y, old, adv, w, inplace=False, **more)[0],
            (leaf(R, V),),
        ),
        "linear_ppo_loss": (
            lambda h, W: linear_ppo_loss(h * 2, W, y, old, adv, w, **more)[0],
            (leaf(R, H), leaf(V, H)),
        ),
        "value_loss": (lambda v: value_loss(v, old, adv, w)[0], (leaf(R),)),
        "linear": (lambda x, W, b: linear(x, W, b).relu(), (leaf(R, H), leaf(V, H), leaf(V))),
        "linear_value_loss": (lambda h, W: linear_value_loss(h, W, None, old, adv, w)[0], (leaf(R, H), leaf(H))),
    }


@pytest.mark.parametrize("name", [name for name in compiled_cases() if name != "linear"])
def test_no_gradient_of_a_gradient_is_silently_zero(name: str) -> None:
    function, inputs = compiled_cases()[name]
    loss = function(*inputs)
    with pytest.raises(RuntimeError):
        gradients = torch.autograd.grad(loss.sum(), inputs, create_graph=True)
        (loss.sum() + sum(g.square().sum() for g in gradients)).backward()


@pytest.mark.parametrize(
    ("compiler", "exact"),
    [
        ("aot_eager", True),
        pytest.param("inductor", False, marks=pytest.mark.slow),  # whose own code around the operator rounds otherwise
    ],
)
@pytest.mark.parametrize("name", list(compiled_cases()))
def test_compiled_whole_it_is_the_same_function(name: str, compiler: str, exact: bool) -> None:
    torch._dynamo.reset()
    function, inputs = compiled_cases()[name]
    expected = function(*inputs)
    gradients = torch.autograd.grad(expected.sum(), inputs)
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    actual = compiled(*inputs)
    rtol, atol = (0.0, 0.0) if exact else (1e-5, 1e-6)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
    for a, b in zip(torch.autograd.grad(actual.sum(), inputs), gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def test_what_has_no_gradient_compiles_too() -> None:
    torch._dynamo.reset()

    def step(r: Tensor, v: Tensor, z: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        advantages, returns = gae(token_rewards(r, r, v, packed(), kl_coef=0.1), v, packed())
        tokens, logprobs = sample(z, u, temperature=0.8)
        return whiten(advantages), returns, tokens, logprobs

    inputs = (row(), row(), leaf(R, V).detach(), -row())
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*inputs), step(*inputs), strict=True):
        assert torch.equal(a, b)


def test_rewards_of_as_many_sequences_as_tokens_compile_too() -> None:
    """The lengths are looked at inside the operator, where tracing does not stop."""
    torch._dynamo.reset()
    compiled = torch.compile(token_rewards, fullgraph=True, backend="aot_eager")
    cu = torch.arange(R + 1, dtype=torch.int32, device=DEVICE)
    scores, logprobs = row(), row()
    made = compiled(scores, logprobs, None, cu, kl_coef=0.0)
    assert torch.equal(made, scores)


def test_grad_output_scales_every_gradient() -> None:
    for name, (function, inputs) in compiled_cases().items():
        once = torch.autograd.grad(function(*inputs).sum(), inputs)
        thrice = torch.autograd.grad(3.0 * function(*inputs).sum(), inputs)
        for a, b in zip(once, thrice, strict=True):
            torch.testing.assert_close(3 * a, b, msg=name)
