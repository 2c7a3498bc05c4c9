"""What only a GPU shows of the kernels: threads that race, addresses beyond 2^31, captured graphs, other roundings."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastppo_kernels import (
    gae,
    gpu,
    linear_ppo_loss,
    linear_value_loss,
    logits_ppo_loss,
    logits_token_logprobs,
    ppo_loss,
    reference,
    sample,
    token_logprobs,
    token_rewards,
    value_loss,
    whiten,
)
from fastppo_kernels.reference import PPORows
from fastppo_kernels.settings import HeadSettings, PPOSettings
from fastppo_kernels.table import PPO_COLUMNS, VALUE_COLUMNS, ppo_table, value_table
from numerics import assert_as_accurate

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
FULL = PPOSettings(kl_coef=0.1, entropy_coef=0.05, old_kl_coef=0.1, dual_clip=2.0)
PLAIN = HeadSettings(temperature=0.7)


def vectors(R: int) -> tuple[Tensor, ...]:
    """(R,) each: old log-probs of a wide vocabulary, advantages, weights, reference log-probs."""
    old = torch.randn(R, device=DEVICE) - 11
    return old, torch.randn(R, device=DEVICE), torch.rand(R, device=DEVICE) + 0.1, old - 0.2


def half_view(logits: Tensor) -> Tensor:
    """bfloat16 over contiguous float32 logits, row on row."""
    return logits.view(torch.bfloat16)[:, : logits.shape[1]]


@pytest.mark.parametrize("V", [1000, 8000, 32768, 32776, 50264, 128256])
def test_half_a_gradient_over_its_logits_is_that_in_memory_of_its_own(V: int) -> None:
    """No thread may store over columns that another has yet to load; twenty times, on every multiprocessor."""
    R = 4 * 132
    logits, targets, rows = 3 * torch.randn(R, V, device=DEVICE), torch.randint(V, (R,), device=DEVICE), vectors(R)
    fresh = torch.empty(R, V, dtype=torch.bfloat16, device=DEVICE)
    wanted = gpu.ppo_rows(logits, targets, PPORows(*rows), FULL, PLAIN, entropy=True, dlogits=fresh)
    for _ in range(20):
        memory = logits.clone()
        dlogits = half_view(memory)
        table = gpu.ppo_rows(memory, targets, PPORows(*rows), FULL, PLAIN, entropy=True, dlogits=dlogits)
        assert torch.equal(table, wanted) and torch.equal(dlogits, fresh)


def needs_memory(gib: int) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free:.0f} are free")


@pytest.mark.parametrize("where", ["bfloat16", "float32 in place", "bfloat16 over float32"])
def test_rows_beyond_two_to_31_elements_are_rows_like_any_other(where: str) -> None:
    needs_memory(24)
    R, V = 16384 + 16, 131072  # the last 16 rows begin at element 2^31 and beyond
    logits = torch.empty(R, V, dtype=torch.bfloat16 if where == "bfloat16" else torch.float32, device=DEVICE)
    logits.normal_()
    targets, rows = torch.randint(V, (R,), device=DEVICE), PPORows(*vectors(R))
    alone = {}
    for some in (slice(0, 16), slice(R - 16, R)):
        x = logits[some].clone()
        dx = half_view(x) if "over" in where else x
        table = gpu.ppo_rows(x, targets[some], rows.take(some), FULL, PLAIN, entropy=True, dlogits=dx)
        alone[some.start] = some, table, dx
    dlogits = half_view(logits) if "over" in where else logits
    table = gpu.ppo_rows(logits, targets, rows, FULL, PLAIN, entropy=True, dlogits=dlogits)
    for some, own_table, own in alone.values():
        assert torch.equal(table[some], own_table) and torch.equal(dlogits[some], own)


def test_draws_and_values_beyond_two_to_31_elements() -> None:
    needs_memory(24)
    logits = torch.empty(16384 + 16, 131072, dtype=torch.bfloat16, device=DEVICE).normal_()
    uniform, last = torch.rand(logits.shape[0], device=DEVICE), slice(16384, None)
    made, alone = sample(logits, uniform, top_k=50), sample(logits[last].clone(), uniform[last], top_k=50)
    assert all(torch.equal(a[last], b) for a, b in zip(made, alone, strict=True))
    del logits
    hidden = torch.empty(2**19 + 64, 4096, dtype=torch.bfloat16, device=DEVICE).normal_()
    weight, rows = torch.randn(4096, device=DEVICE).bfloat16() / 64, vectors(hidden.shape[0])[:3]
    dhidden, last = torch.empty_like(hidden), slice(2**19, None)
    table, _ = gpu.linear_value_rows(hidden, weight, None, *rows, clip=0.2, dhidden=dhidden)
    own = torch.empty_like(hidden[last])
    own_table, _ = gpu.linear_value_rows(
        hidden[last].clone(), weight, None, *(x[last] for x in rows), clip=0.2, dhidden=own
    )
    assert torch.equal(table[last], own_table) and torch.equal(dhidden[last], own)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("softcap", [None, 30.0, 4.0])
def test_rows_of_any_dtype_with_a_soft_cap_answer_to_float64(softcap: float | None, dtype: torch.dtype) -> None:
    R, V = 300, 50264
    head = HeadSettings(temperature=0.7, softcap=softcap)
    logits, targets = (6 * torch.randn(R, V, device=DEVICE)).to(dtype), torch.randint(V, (R,), device=DEVICE)
    rows = PPORows(*vectors(R))

    def expected(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = logits.to(dtype).requires_grad_()
        logprobs, entropy = reference.logits_token_logprobs(x, targets, head)
        cleaned = rows.cleaned(rows.weights != 0, dtype)
        loss, _ = reference.ppo_loss(logprobs, cleaned, FULL, entropy)
        return ppo_table(logprobs, entropy, cleaned, FULL), torch.autograd.grad(loss, x)[0]

    dlogits = torch.empty_like(logits)
    table = gpu.ppo_rows(logits, targets, rows, FULL, head, entropy=True, dlogits=dlogits)
    (base_table, base), (true_table, truth) = expected(torch.float32), expected(torch.float64)
    for i, name in enumerate(PPO_COLUMNS):
        assert_as_accurate(name, table[:, i], base_table[:, i], true_table[:, i], atol=1e-6)
    assert_as_accurate("dlogits", dlogits, base.to(dtype), truth, atol=1e-7)


def test_a_target_outside_the_vocabulary_makes_nan_of_its_row_alone() -> None:
    logits, targets = torch.randn(9, 50264, device=DEVICE), torch.randint(50264, (9,), device=DEVICE)
    rows, clean, made = PPORows(*vectors(9)), torch.empty_like(logits), torch.empty_like(logits)
    wanted = gpu.ppo_rows(logits, targets, rows, FULL, PLAIN, entropy=True, dlogits=clean)
    targets[[0, 4, 8]] = torch.tensor([-100, 50264, 10**12], device=DEVICE)
    table = gpu.ppo_rows(logits, targets, rows, FULL, PLAIN, entropy=True, dlogits=made)
    bad = torch.zeros(9, dtype=torch.bool, device=DEVICE).index_fill(0, torch.tensor([0, 4, 8], device=DEVICE), True)
    assert table[bad, PPO_COLUMNS.index("loss")].isnan().all() and made[bad].isnan().all()
    assert torch.equal(table[~bad], wanted[~bad]) and torch.equal(made[~bad], clean[~bad])


def packed(num_sequences: int) -> Tensor:
    """(B+1,) of sequences of up to 2048 tokens, some empty, as many as there are with one."""
    lengths = torch.randint(0, 2048, (num_sequences,))
    lengths[::7], lengths[1::7] = 0, 1
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)


def test_advantages_and_rewards_of_real_sequences_answer_to_float64() -> None:
    cu = packed(200)
    N, B = int(cu[-1]), cu.shape[0] - 1
    r, v, ref, mask, after = torch.randn(N), torch.randn(N), torch.randn(N), torch.rand(N) > 0.1, torch.randn(B)
    options: dict[str, Any] = {"gamma": 0.999, "lam": 0.97, "mask": mask}
    placed: dict[str, Any] = options | {"mask": mask.to(DEVICE)}
    made = gae(r.to(DEVICE), v.to(DEVICE), cu.to(DEVICE), bootstrap_values=after.to(DEVICE), **placed)
    plain = reference.gae(r, v, cu, bootstrap_values=after, **options)
    truth = reference.gae(r.double(), v.double(), cu, bootstrap_values=after.double(), **options)
    for name, a, p, t in zip(("advantages", "returns"), made, plain, truth, strict=True):
        assert_as_accurate(name, a.cpu(), p, t)
    for estimator in ("k1", "k2", "k3"):
        penalty: dict[str, Any] = {"kl_coef": 0.1, "kl_estimator": estimator}
        on_gpu = (after.to(DEVICE), v.to(DEVICE), ref.to(DEVICE))
        shaped = token_rewards(*on_gpu, cu.to(DEVICE), mask=mask.to(DEVICE), **penalty)
        plain_rewards = reference.token_rewards(after, v, ref, cu, mask=mask, **penalty)
        doubled = (after.double(), v.double(), ref.double())
        true_rewards = reference.token_rewards(*doubled, cu, mask=mask, **penalty)
        assert_as_accurate(estimator, shaped.cpu(), plain_rewards, true_rewards)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("H", [896, 4096, 8192])
def test_value_head_answers_to_float64(H: int, dtype: torch.dtype) -> None:
    R = 1000
    hidden, weight = torch.randn(R, H, device=DEVICE).to(dtype), (torch.randn(H, device=DEVICE) / H**0.5).to(dtype)
    rows, dhidden = vectors(R)[:3], torch.empty(R, H, device=DEVICE)
    rows = (0.3 * rows[0] + 3, *rows[1:])
    table, dweight = gpu.linear_value_rows(hidden, weight, None, *rows, clip=0.2, dhidden=dhidden)

    def expected(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        h, w = hidden.to(dtype), weight.to(dtype)
        found = value_table(h @ w, *(x.to(dtype) for x in rows), clip=0.2)
        dvalue = found[:, VALUE_COLUMNS.index("dvalue")]
        return found, dvalue[:, None] * w, dvalue @ h

    for name, a, p, t in zip(
        ("table", "dhidden", "dweight"),
        (table, dhidden, dweight),
        expected(torch.float32),
        expected(torch.float64),
        strict=True,
    ):
        assert a is not None
        columns = slice(None) if name != "table" else [0, 1, 2, 4, 5]  # a value on the edge may be clipped or not
        index = (slice(None), columns) if a.ndim == 2 else columns
        assert_as_accurate(name, a[index], p[index], t[index])


@pytest.mark.parametrize("truncation", [{"top_k": 50}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_truncated_draws_are_those_of_the_cpu(dtype: torch.dtype, truncation: dict[str, Any]) -> None:
    logits, uniform = (3 * torch.randn(64, 128256)).to(dtype), torch.rand(64)
    tokens, logprobs, mass = sample(logits, uniform, temperature=0.8, return_mass=True, **truncation)
    made = sample(logits.to(DEVICE), uniform.to(DEVICE), temperature=0.8, return_mass=True, **truncation)
    same = made[0].cpu() == tokens
    assert same.float().mean() > 0.95  # a cumulative sum may round across a border
    torch.testing.assert_close(made[1].cpu()[same], logprobs[same], atol=1e-5, rtol=0)
    torch.testing.assert_close(made[2].cpu(), mass, atol=1e-5, rtol=0)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parts", [[1500], [1, 1499], [777, 23, 700], [512, 512, 476]], ids=str)
def test_the_ratio_is_one_exactly_however_the_rows_were_scored(parts, dtype, entropy_coef) -> None:
    """In one call or in many, few rows (which share a row between programs) or a full GPU of them."""
    R, H, V = 1500, 256, 50264
    hidden, weight = torch.randn(R, H, device=DEVICE).to(dtype), (0.1 * torch.randn(V, H, device=DEVICE)).to(dtype)
    targets, (_, advantages, weights, _) = torch.randint(V, (R,), device=DEVICE), vectors(R)
    pieces = zip(hidden.split(parts), targets.split(parts), strict=True)
    scored = torch.cat([token_logprobs(h, weight, t, temperature=0.7) for h, t in pieces])
    options = {"entropy_coef": entropy_coef, "temperature": 0.7}
    _, stats = linear_ppo_loss(hidden.requires_grad_(), weight, targets, scored, advantages, weights, **options)
    assert stats["ratio_max"] == 1 and stats["ratio_sum"] == R and stats["old_k2_sum"] == 0


def graph_cases() -> dict[str, Callable[[], list[Tensor]]]:
    """Every op, forward and backward, on inputs that stay where they are."""
    R, V, H, cu = 64, 5003, 128, torch.tensor([0, 20, 20, 64], dtype=torch.int32, device=DEVICE)
    old, advantages, weights, ref = vectors(R)
    targets, uniform = torch.randint(V, (R,), device=DEVICE), torch.rand(R, device=DEVICE)
    logits = torch.randn(R, V, device=DEVICE).requires_grad_()
    hidden, weight = torch.randn(R, H, device=DEVICE).requires_grad_(), torch.randn(V, H, device=DEVICE)
    weight, head = weight.requires_grad_(), torch.randn(H, device=DEVICE).requires_grad_()

    def with_gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    def ppo(op: Callable[..., Any], *inputs: Tensor, **options: Any) -> list[Tensor]:
        loss, stats = op(*inputs, targets, old, advantages, weights, ref_logprobs=ref, kl_coef=0.1, **options)
        return with_gradients(loss, *inputs) + list(stats.values())

    def tokens() -> list[Tensor]:
        logprobs = old.clone().requires_grad_()
        return with_gradients(ppo_loss(logprobs, ref, advantages, weights)[0], logprobs)

    def values() -> list[Tensor]:
        v = old.clone().requires_grad_()
        return with_gradients(value_loss(v, ref, advantages, weights)[0], v)

    return {
        "ppo_loss": tokens,
        "logits_ppo_loss": lambda: ppo(logits_ppo_loss, logits, entropy_coef=0.01, inplace=False),
        "linear_ppo_loss": lambda: ppo(linear_ppo_loss, hidden, weight),
        "token_logprobs": lambda: with_gradients(token_logprobs(hidden, weight, targets).sum(), hidden, weight),
        "logits_token_logprobs": lambda: with_gradients(logits_token_logprobs(logits, targets).sum(), logits),
        "value_loss": values,
        "linear_value_loss": lambda: with_gradients(
            linear_value_loss(hidden, head, None, old, advantages, weights)[0], hidden, head
        ),
        "gae": lambda: [*gae(advantages, old, cu)],
        "token_rewards": lambda: [token_rewards(advantages[:3], old, ref, cu, kl_coef=0.1)],
        "whiten": lambda: [whiten(advantages)],
        "sample": lambda: [*sample(logits.detach(), uniform)],
        "sample top_k top_p": lambda: [*sample(logits.detach(), uniform, top_k=20, top_p=0.9)],
    }


@pytest.mark.parametrize("name", list(graph_cases()) if torch.cuda.is_available() else ["every op"])
def test_a_captured_graph_gives_what_the_op_gives(name: str) -> None:
    run = graph_cases()[name]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and makes the libraries' workspaces
        wanted = [x.clone() for x in run()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = run()
    for x in made:
        x.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(made, wanted, strict=True):
        torch.testing.assert_close(a, b)
