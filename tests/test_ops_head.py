"""Laws of the chunked LM head: its chunks, the padding of its products on a GPU, and their precision."""

import pytest
import torch
from torch import Tensor

from fastppo_kernels import head, linear_ppo_loss, native, token_logprobs
from fastppo_kernels.head import ChunkedHead, default_chunk_size, exact_products
from numerics import DEVICE

H, V, PIECE = 6, 11, 4
SWITCHES = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")


@pytest.fixture
def product_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Any device pads products like a GPU, to pieces of 4 rows; how many every product then has.

    That of the weight's gradient, which sums over rows, is left out.
    """
    seen: list[int] = []
    plain = head._multiply

    def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
        if out.shape[0] != V:
            seen.append(a.shape[0])
        plain(a, b, out)

    monkeypatch.setattr(head, "_multiply", multiply)
    monkeypatch.setattr(head, "pads_products", lambda device: True)
    monkeypatch.setattr(head, "PIECE_ROWS", PIECE)
    return seen


def run(R: int, chunk_size: int | None) -> list[Tensor]:
    """Logits of R rows, and the gradients of half their squared sum."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((64, H), (V, H), (V,))
    hidden, weight, bias = (torch.randn(s, generator=generator, dtype=torch.float64).to(DEVICE) for s in shapes)
    bias[3] = -1e300  # what stands in the padding must not matter
    chunked = ChunkedHead(
        hidden[:R], weight, bias, chunk_size=chunk_size, backend="reference", wanted=(True, True, True)
    )
    made = [torch.empty(0, V, dtype=torch.float64, device=DEVICE)]
    for rows in chunked.chunks():
        logits = chunked.logits(rows)
        logits[:, 3] = 0
        made.append(logits.clone())
        chunked.accumulate(rows)
    return [torch.cat(made), *chunked.gradients(hidden, weight, bias)]


@pytest.mark.parametrize("R", [0, 1, 4, 9, 21])
@pytest.mark.parametrize("chunk_size", [3, 4, 8, 10, None])
def test_padding_changes_no_number(R: int, chunk_size: int | None, product_rows: list[int]) -> None:
    made = run(R, chunk_size)
    assert set(product_rows) <= {min(PIECE, chunk_size or PIECE)}, "every product has as many rows"
    assert [x.shape for x in made] == [(R, V), (R, H), (V, H), (V,)]
    hidden = run(R, 64)[0]  # one chunk
    torch.testing.assert_close(made[0], hidden)
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(head, "pads_products", lambda device: False)
        for a, b in zip(made, run(R, chunk_size), strict=True):
            torch.testing.assert_close(a, b)


def test_the_losses_run_on_padded_products(product_rows: list[int]) -> None:
    hidden, weight = torch.randn(9, H, device=DEVICE), torch.randn(V, H, device=DEVICE)
    targets, ones = torch.arange(9, device=DEVICE), torch.ones(9, device=DEVICE)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]

    def losses() -> list[Tensor]:
        logprobs = token_logprobs(hidden, weight, targets, chunk_size=8)
        loss = linear_ppo_loss(hidden, weight, targets, None, ones, ones, chunk_size=8)[0]
        return [logprobs, *torch.autograd.grad(logprobs.sum(), leaves), loss, *torch.autograd.grad(loss, leaves)]

    made = losses()
    assert set(product_rows) == {PIECE}
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(head, "pads_products", lambda device: False)
        for a, b in zip(made, losses(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("R", [1, 7, 100, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bits_of_a_row_do_not_depend_on_how_many_there_are(R: int, dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(300, 64, device=DEVICE).to(dtype), torch.randn(1000, 64, device=DEVICE).to(dtype)
    targets = torch.randint(1000, (300,), device=DEVICE)
    whole = token_logprobs(hidden, weight, targets)
    assert torch.equal(token_logprobs(hidden[:R], weight, targets[:R]), whole[:R])
    assert torch.equal(token_logprobs(hidden[-R:], weight, targets[-R:]), whole[-R:])


@pytest.mark.parametrize("H", [64, 4096])
@pytest.mark.parametrize("V", [1000, 32000, 128256, 151936, 10_000_000])
def test_chunks_of_a_gpu_are_whole_pieces_of_at_most_two_gib(V: int, H: int) -> None:
    rows = default_chunk_size(V, H, torch.device("cuda"))
    assert rows % min(rows, head.PIECE_ROWS) == 0 and rows % 128 == 0
    assert rows * V * 4 <= 2 << 30 or rows in (head.MIN_CHUNK_ROWS, head.WIDE_CHUNK_ROWS)


@pytest.mark.parametrize("H", [64, 128, 511, 512, 896, 4096])
@pytest.mark.parametrize("V", [1000, 32000, 151936])
def test_a_chunk_of_a_cpu_takes_the_caches_share_or_few_rows_or_what_the_gradient_takes(V: int, H: int) -> None:
    size = default_chunk_size(V, H, torch.device("cpu")) * V * 4
    assert size <= max(head.CHUNK_BYTES["cpu"], 4 * head.MIN_CHUNK_ROWS * V, 4 * V * H)


def test_wide_heads_have_wide_chunks() -> None:
    sizes = [default_chunk_size(151936, H, torch.device("cpu")) for H in (511, 512)]
    assert sizes == [head.MIN_CHUNK_ROWS, head.WIDE_CHUNK_ROWS] == [256, 512]


def test_products_are_exact_inside_and_switches_are_put_back() -> None:
    matmul = torch.backends.cuda.matmul
    before = [getattr(matmul, name) for name in SWITCHES]
    try:
        for allowed in (True, False):
            for name in SWITCHES:
                setattr(matmul, name, allowed)
            with pytest.raises(KeyError), exact_products(torch.zeros(1)):
                assert not any(getattr(matmul, name) for name in SWITCHES)
                raise KeyError
            assert [getattr(matmul, name) for name in SWITCHES] == [allowed, allowed]
    finally:
        for name, allowed in zip(SWITCHES, before, strict=True):
            setattr(matmul, name, allowed)


def test_every_product_of_an_op_is_made_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of the ops that multiply by the head."""
    seen: list[bool] = []
    for name in ("logits", "accumulate"):
        plain = getattr(ChunkedHead, name)

        def watched(*arguments: object, plain: object = plain) -> object:
            seen.append(any(getattr(torch.backends.cuda.matmul, name) for name in SWITCHES))
            return plain(*arguments)  # pyright: ignore[reportCallIssue]

        monkeypatch.setattr(ChunkedHead, name, watched)
    hidden, weight = torch.randn(3, H, device=DEVICE), torch.randn(V, H, device=DEVICE, requires_grad=True)
    targets, ones = torch.arange(3, device=DEVICE), torch.ones(3, device=DEVICE)
    token_logprobs(hidden, weight, targets).sum().backward()
    linear_ppo_loss(hidden, weight, targets, None, ones, ones)
    assert seen == [False] * 5


@pytest.mark.skipif(DEVICE != "cpu", reason="products of the reference on a CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_does_not_multiply_in_cpp(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it could not tell that the product is wrong."""
    monkeypatch.setattr(native, "matmul", None)
    hidden, weight = (torch.randn(n, 8).to(dtype).requires_grad_() for n in (5, 7))
    logprobs = token_logprobs(hidden, weight, torch.arange(5), backend="reference")
    logprobs.sum().backward()
    assert logprobs.isfinite().all() and weight.grad is not None
