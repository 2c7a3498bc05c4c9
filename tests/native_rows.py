"""Problems and references of the tests of the C++ row kernels, and the fixture of all tests of C++."""

import math
from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from hypothesis import HealthCheck
from torch import Tensor

from fastppo_kernels import reference
from fastppo_kernels.native import isa as isas
from fastppo_kernels.native import rows as native
from fastppo_kernels.reference import PPORows
from fastppo_kernels.settings import HeadSettings
from fastppo_kernels.table import PPO_COLUMNS
from numerics import assert_as_accurate, guarded

PLAIN = HeadSettings()
HEADS = (PLAIN, HeadSettings(temperature=0.6), HeadSettings(temperature=0.8, softcap=30.0))
DTYPES = (torch.float32, torch.bfloat16)
COLUMN = {name: i for i, name in enumerate(PPO_COLUMNS)}


@pytest.fixture(params=isas.available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The instruction set that runs. It is the same for all examples of hypothesis: suppress `UNRESET`."""
    monkeypatch.setenv(isas.ISA_VARIABLE, request.param)
    return request.param


UNRESET = [HealthCheck.function_scoped_fixture]


def on_every_isa(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Sequence[Tensor]]) -> dict[str, Sequence[Tensor]]:
    """What `run` returns, by instruction set."""
    made = {}
    for name in isas.available_isas():
        monkeypatch.setenv(isas.ISA_VARIABLE, name)
        made[name] = run()
    return made


def on_threads(run: Callable[[], Sequence[Tensor]]) -> list[Sequence[Tensor]]:
    """What `run` returns on one, two and five threads."""
    made = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        made.append(run())
    return made


def assert_same_bits(made: Iterable[Sequence[Tensor]]) -> None:
    first, *others = made
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def strided(x: Tensor, extra: int) -> Tensor:
    """Copy of (R, V) `x` whose rows lie V + extra apart, NaN between and behind them."""
    wide = torch.full((x.shape[0], x.shape[1] + extra), math.nan, dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    return guarded(wide)[:, : x.shape[1]]


def problem(R: int, V: int, dtype: torch.dtype = torch.float32, *, scale: float = 4.0) -> tuple[Tensor, Tensor]:
    return strided((scale * torch.randn(R, V)).to(dtype), 3), torch.randint(V, (R,))


def ppo_constants(logprobs: Tensor, *, dead: float = 0.2) -> PPORows:
    """Ratios on both sides of every clip and far beyond, advantages of both signs, some dead rows full of NaN."""
    R = logprobs.shape[0]
    alive = torch.rand(R) >= dead

    def number(x: Tensor) -> Tensor:
        return torch.where(alive, x.float(), math.nan)

    spread = torch.tensor([0.1, 0.5, 2.0, 25.0])[torch.randint(4, (R,))]
    return PPORows(
        number(logprobs + spread * torch.randn(R)),
        number(torch.randn(R)),
        torch.where(alive, torch.rand(R) + 0.1, 0.0),
        number(logprobs + torch.randn(R)),
        number(2 * torch.rand(R)),
        number(logprobs + 0.01 * torch.randn(R)),
    )


def plain_logprobs(logits: Tensor, targets: Tensor, head: HeadSettings, grads: tuple[Tensor, Tensor]) -> list[Tensor]:
    """[logprobs, entropy, dlogits] of the reference in the dtype of the logits."""
    z = logits.clone().requires_grad_()
    logprobs, entropy = reference.logits_token_logprobs(z, targets, head)
    assert entropy is not None
    loss = (logprobs * grads[0].to(logprobs)).sum() + (entropy * grads[1].to(entropy)).sum()
    return [logprobs.detach(), entropy.detach(), *torch.autograd.grad(loss, z)]


def check_logprobs(
    logits: Tensor, targets: Tensor, head: HeadSettings, out: torch.dtype, *, atol: float = 5e-7
) -> None:
    """`atol`: nats by which log-probs and entropies may be off even where plain PyTorch is right by luck."""
    R = logits.shape[0]
    grads = (torch.randn(R), torch.randn(R))
    logprobs, entropy = native.logprob_rows(logits, targets, head, entropy=True)
    assert entropy is not None
    dlogits = strided(torch.zeros_like(logits, dtype=out), 5)
    native.logprob_rows_backward(logits, targets, *grads, head, dlogits=dlogits)
    baseline = plain_logprobs(logits.float(), targets, head, grads)
    truth = plain_logprobs(logits.double(), targets, head, grads)
    baseline[2] = baseline[2].to(out)
    for name, a, b, t in zip(
        ("logprobs", "entropy", "dlogits"), (logprobs, entropy, dlogits), baseline, truth, strict=True
    ):
        assert_as_accurate(name, a, b, t, atol=1e-30 if name == "dlogits" else atol)
