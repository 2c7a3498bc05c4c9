"""Laws of packed_attention, on every backend and instruction set of the CPU."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastppo_kernels import packed_attention
from fastppo_kernels.native import isa as isas
from numerics import assert_as_accurate

NAN = float("nan")
BACKENDS = ["reference", *(f"native {name}" for name in isas.available_isas())]
LENGTHS = [9, 1, 0, 33, 64, 7, 300, 2]  # none, less than a block, blocks of keys and queries and more


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name, _, isa = request.param.partition(" ")
    if isa:
        monkeypatch.setenv(isas.ISA_VARIABLE, isa)
    return name


@dataclass
class Problem:
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    lengths: list[int]

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32)

    def run(self, **settings: Any) -> dict[str, Tensor]:
        """Result and gradients."""
        q, k, v = (x.detach().requires_grad_() for x in (self.q, self.k, self.v))
        out = packed_attention(q, k, v, self.cu_seqlens, **settings)
        return dict(
            zip(("out", "dq", "dk", "dv"), (out.detach(), *torch.autograd.grad(out, (q, k, v), self.dout)), strict=True)
        )

    def truth(self, *, window: int | None = None, scale: float | None = None) -> dict[str, Tensor]:
        """Each token by itself in float64, gradients by autograd."""
        q, k, v = (x.detach().double().requires_grad_() for x in (self.q, self.k, self.v))
        group, rows, start = q.shape[1] // k.shape[1], [q[:0]], 0
        for length in self.lengths:
            for i in range(length):
                seen = slice(start + max(0, i + 1 - (window or length)), start + i + 1)
                keys, values = (x[seen].repeat_interleave(group, dim=1) for x in (k, v))
                scores = (keys * q[start + i]).sum(-1) * (q.shape[2] ** -0.5 if scale is None else scale)
                rows.append((scores.softmax(0)[:, :, None] * values).sum(0, keepdim=True))
            start += length
        out = torch.cat(rows)
        grads = torch.autograd.grad(out, (q, k, v), self.dout.double())
        return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))


def problem(lengths: list[int], heads: int, kv_heads: int, D: int) -> Problem:
    n = sum(lengths)
    q, dout = torch.randn(2, n, heads, D)
    k, v = torch.randn(2, n, kv_heads, D)
    return Problem(2 * q, k, v, dout, lengths)


def assert_right(p: Problem, backend: str, *, atol: float = 0.0, **settings: Any) -> None:
    """The reference is the plain PyTorch that errs as much as one may: it sums in another order too."""
    made, rough = p.run(backend=backend, **settings), p.run(backend="reference", **settings)
    exact = p.truth(**settings)
    for name, x in made.items():
        assert_as_accurate(name, x, rough[name], exact[name], atol=atol)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "D"), [(1, 1, 8), (4, 2, 64), (7, 1, 16), (3, 3, 80), (2, 1, 20), (2, 1, 256)]
)
def test_a_token_is_its_softmax_over_its_sequence_up_to_itself(backend: str, heads: int, kv_heads: int, D: int) -> None:
    assert_right(problem(LENGTHS, heads, kv_heads, D), backend)


@pytest.mark.parametrize("settings", [{"window": 1}, {"window": 33}, {"window": 1000}, {"scale": 3.0, "window": 100}])
def test_windows_and_scales(backend: str, settings: dict[str, Any]) -> None:
    atol = 1e-5 if settings.get("window") == 1 else 0.0  # then dq and dk are differences of equal numbers
    assert_right(problem([40, 3, 290], 4, 2, 32), backend, atol=atol, **settings)


def test_large_scores_neither_overflow_nor_hide_each_other(backend: str) -> None:
    p = problem([70, 9], 2, 1, 16)
    assert_right(replace(p, q=100 * p.q), backend)


def test_heads_and_tokens_may_lie_anywhere_in_memory(backend: str) -> None:
    """As models hand them over: heads first, all three in one tensor, elements apart."""
    p = problem([30, 5], 4, 2, 16)
    expected = p.run(backend=backend)
    apart = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (p.q, p.k, p.v)]
    both = torch.cat([p.q, p.k, p.v], dim=1).split([4, 2, 2], dim=1)
    spread = [torch.stack([x, x], -1)[..., 0] for x in (p.q, p.k, p.v)]
    for q, k, v in (apart, both, spread):
        made = replace(
            p, q=q, k=k, v=v, dout=torch.stack([p.dout, p.dout])[0].transpose(0, 1).contiguous().transpose(0, 1)
        )
        for name, x in made.run(backend=backend).items():
            assert torch.equal(x, expected[name]), name


def test_a_token_depends_on_its_own_sequence_up_to_itself_alone(backend: str) -> None:
    """Bit for bit, alone or beside others, whole or cut. (The reference: a product of another size.)"""
    p = problem([5, 300, 61], 4, 2, 32)
    together = packed_attention(p.q, p.k, p.v, p.cu_seqlens, backend=backend)
    for first, last in ((0, 5), (5, 305), (305, 366), (5, 105), (305, 308)):
        q, k, v = (x[first:last] for x in (p.q, p.k, p.v))
        alone = packed_attention(q, k, v, torch.tensor([0, last - first], dtype=torch.int32), backend=backend)
        if backend == "reference":
            torch.testing.assert_close(alone, together[first:last], atol=1e-6, rtol=1e-5)
        else:
            assert torch.equal(alone, together[first:last])


def test_the_number_of_threads_changes_nothing() -> None:
    p, threads = problem([5, 600, 61, 128], 4, 2, 32), torch.get_num_threads()
    made = []
    try:
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            made.append(p.run(backend="native"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, made[0][name]) for one in made for name, x in one.items())


def test_a_nan_stays_in_its_sequence(backend: str) -> None:
    p = problem([30, 8, 40], 2, 1, 16)
    p.k[33, 0, 3] = p.v[33, 0, 1] = p.q[31, 0, 0] = NAN
    for x in p.run(backend=backend).values():
        assert x[30:38].isnan().any() and x[:30].isfinite().all() and x[38:].isfinite().all()


def test_no_tokens(backend: str) -> None:
    for lengths in ([], [0, 0]):
        shapes = [tuple(x.shape) for x in problem(lengths, 4, 2, 16).run(backend=backend).values()]
        assert shapes == [(0, 4, 16), (0, 4, 16), (0, 2, 16), (0, 2, 16)]


def test_known_weights() -> None:
    """Two keys, scores ln 3 apart: weights 3/4 and 1/4, and d weight = 3/16 either way."""
    q, k, v = (torch.tensor(x).view(2, 1, 1).requires_grad_() for x in ([0.0, 1.0], [1.0986123, 0.0], [8.0, 0.0]))
    out = packed_attention(q, k, v, torch.tensor([0, 2], dtype=torch.int32), scale=1.0)
    assert out.flatten().tolist() == pytest.approx([8.0, 6.0], rel=1e-6)
    dq, dk, dv = torch.autograd.grad(out[1].sum(), (q, k, v))
    assert dv.flatten().tolist() == pytest.approx([0.75, 0.25], rel=1e-6)
    assert dk.flatten().tolist() == pytest.approx([1.5, -1.5], rel=1e-6)
    assert dq.flatten().tolist() == pytest.approx([0.0, 1.5 * 1.0986123], rel=1e-6)


def test_the_default_dtype_does_not_matter() -> None:
    p = problem([5, 300], 4, 2, 32)
    expected = p.run(backend="native")
    try:
        torch.set_default_dtype(torch.bfloat16)
        made = p.run(backend="native")
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(x, expected[name]) for name, x in made.items())


def test_no_quadratic_memory() -> None:
    p = problem([4000], 2, 1, 16)
    with torch.profiler.profile(profile_memory=True) as profile:
        p.run(backend="native")
    largest = max(event.cpu_memory_usage for event in profile.events() or [])
    assert 0 < largest < 4 * 4000 * 4000 / 10


def test_opcheck() -> None:
    p = problem([3, 9], 4, 2, 16)
    arguments = (p.q, p.k, p.v, p.cu_seqlens, 0.25, None)
    torch.library.opcheck(torch.ops.fastppo.packed_attention.default, arguments)
    out, origins = torch.ops.fastppo.packed_attention(*arguments)
    torch.library.opcheck(torch.ops.fastppo.packed_attention_backward.default, (p.dout, *arguments, out, origins))


def test_it_compiles_in_one_graph() -> None:
    p = problem([3, 9], 4, 2, 16)
    compiled = torch.compile(lambda q: 2 * packed_attention(q, p.k, p.v, p.cu_seqlens), fullgraph=True)
    q = p.q.requires_grad_()
    out = compiled(q)
    assert torch.equal(out, 2 * packed_attention(q, p.k, p.v, p.cu_seqlens))
    (made,), (expected,) = (
        torch.autograd.grad(x, q, p.dout) for x in (out, 2 * packed_attention(q, p.k, p.v, p.cu_seqlens))
    )
    assert torch.equal(made, expected)


def test_it_is_differentiated_once() -> None:
    p = problem([3], 2, 1, 16)
    out = packed_attention(p.q.requires_grad_(), p.k, p.v, p.cu_seqlens)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(out.sum(), p.q, create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(5, 2, 8)}, "k must have shape"),
        ({"v": torch.zeros(4, 2, 16)}, "v must have shape"),
        ({"q": torch.zeros(5, 3, 16)}, "multiple of kv_heads"),
        ({"q": torch.zeros(5, 16)}, "q must be"),
        ({"q": torch.zeros(5, 4, 16, dtype=torch.int64)}, "floating-point"),
        ({"k": torch.zeros(5, 2, 16, dtype=torch.bfloat16)}, "k must have the dtype"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "must be .* int32"),
        ({"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32)}, "rise from 0 to N = 5"),
        ({"cu_seqlens": torch.tensor([1, 5], dtype=torch.int32)}, "rise from 0 to N = 5"),
        ({"cu_seqlens": torch.tensor([0, 7, 5], dtype=torch.int32)}, "rise from 0 to N = 5"),
        ({"window": 0}, "window must be >= 1"),
        ({"scale": -1.0}, "scale must be finite and > 0"),
        ({"backend": "cuda"}, "does not exist"),
        ({name: torch.zeros(5, 2, 16, dtype=torch.bfloat16) for name in "qkv"}, "must be float32"),
    ],
)
def test_bad_input_says_what_is_wrong(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"q": torch.zeros(5, 4, 16), "k": torch.zeros(5, 2, 16), "v": torch.zeros(5, 2, 16)}
    good |= {"cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32), "backend": "native"}
    with pytest.raises(ValueError, match=message):
        packed_attention(**good | change)
