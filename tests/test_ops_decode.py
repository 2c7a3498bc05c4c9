"""Laws of decode_attention, on every backend and instruction set."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fastppo_kernels import decode_attention
from fastppo_kernels.gpu import decode as gpu
from fastppo_kernels.native import isa as isas
from fastppo_kernels.settings import DecodeSettings
from numerics import DEVICE, assert_as_accurate

NAN = float("nan")
ON_CPU = ["reference", *(f"native {name}" for name in isas.available_isas())]
BACKENDS = ["reference", "triton"] if DEVICE == "cuda" else [*ON_CPU, "triton"]  # interpreted without a GPU


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name, _, isa = request.param.partition(" ")
    if isa:
        monkeypatch.setenv(isas.ISA_VARIABLE, isa)
    return name


@dataclass
class Problem:
    """New tokens of n sequences, and memory whose unused places are NaN."""

    q: Tensor
    k: Tensor
    v: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor

    def run(self, rows: slice = slice(None), **settings: Any) -> Tensor:
        keys, values = self.keys.clone(), self.values.clone()
        q, k, v = self.q[rows], self.k[rows], self.v[rows]
        return decode_attention(q, k, v, keys[rows], values[rows], self.positions[rows], **settings)

    def truth(self, dtype: torch.dtype, *, window: int | None = None, softcap: float | None = None) -> Tensor:
        """Each sequence and head by itself, in `dtype`."""
        group = self.q.shape[1] // self.k.shape[1]
        out = torch.empty_like(self.q, dtype=dtype)
        for i, position in enumerate(self.positions.tolist()):
            first = 0 if window is None else max(position + 1 - window, 0)
            for h in range(self.q.shape[1]):
                places = (i, h // group, slice(first, position))
                keys = torch.cat([self.keys[places], self.k[i, h // group, None]]).to(dtype)
                values = torch.cat([self.values[places], self.v[i, h // group, None]]).to(dtype)
                scores = keys @ self.q[i, h].to(dtype) * self.q.shape[2] ** -0.5
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                out[i, h] = scores.softmax(0) @ values
        return out


def problem(
    positions: list[int], heads: int, kv_heads: int, D: int, *, dtype: torch.dtype = torch.float32, spare: int = 3
) -> Problem:
    n, length = len(positions), max(positions) + 1 + spare
    q = 2 * torch.randn(n, heads, D)
    k, v = torch.randn(2, n, kv_heads, D)
    keys, values = torch.randn(2, n, kv_heads, length, D)
    for i, position in enumerate(positions):
        keys[i, :, position:] = values[i, :, position:] = NAN
    q, k, v, keys, values = (x.to(DEVICE, dtype) for x in (q, k, v, keys, values))
    return Problem(q, k, v, keys, values, torch.tensor(positions, device=DEVICE))


@pytest.mark.parametrize("precision", ["single", "half"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "D"), [(1, 1, 8), (4, 2, 64), (14, 2, 16), (3, 3, 80), (2, 1, 20), (2, 1, 256)]
)
def test_a_head_is_its_softmax_over_the_positions_up_to_its_own(
    backend: str, heads: int, kv_heads: int, D: int, precision: str
) -> None:
    interpreted_half = precision == "half" and backend == "triton" and DEVICE == "cpu"
    dtype = torch.float32 if precision == "single" else torch.float16 if interpreted_half else torch.bfloat16
    p = problem([0, 5, 63, 64, 130], heads, kv_heads, D, dtype=dtype)
    if interpreted_half:  # the interpreter multiplies bfloat16 matrices wrongly
        settings = DecodeSettings(scale=D**-0.5, span=p.keys.shape[2])
        out = gpu.decode_attention(p.q, p.k, p.v, p.keys.clone(), p.values.clone(), p.positions, settings)
    else:
        out = p.run(backend=backend)
    assert_as_accurate("out", out, p.truth(dtype), p.truth(torch.float64))


@pytest.mark.parametrize(
    "settings", [{"window": 1}, {"window": 50}, {"window": 1000}, {"softcap": 5.0}, {"window": 33, "softcap": 2.0}]
)
def test_windows_and_soft_caps(backend: str, settings: dict[str, Any]) -> None:
    p = problem([0, 40, 100], 4, 2, 32)
    for i, position in enumerate(p.positions.tolist()):  # what was before the window may hold anything
        p.keys[i, :, : max(position + 1 - settings.get("window", 1000), 0)] = NAN
        p.values[i, :, : max(position + 1 - settings.get("window", 1000), 0)] = NAN
    out = p.run(backend=backend, **settings)
    assert_as_accurate("out", out, p.truth(torch.float32, **settings), p.truth(torch.float64, **settings))


@pytest.mark.parametrize("settings", [{}, {"window": 700}, {"window": 200}])
def test_sequences_longer_than_a_chunk(backend: str, settings: dict[str, Any]) -> None:
    p = problem([gpu.CHUNK - 1, gpu.CHUNK, 2 * gpu.CHUNK + 100, 3], 2, 1, 16)
    out = p.run(backend=backend, **settings)
    assert_as_accurate("out", out, p.truth(torch.float32, **settings), p.truth(torch.float64, **settings))


def test_large_scores_neither_overflow_nor_hide_each_other(backend: str) -> None:
    p = problem([70, 9], 2, 1, 16)
    p.q *= 100
    assert_as_accurate("out", p.run(backend=backend), p.truth(torch.float32), p.truth(torch.float64))


@pytest.mark.parametrize("window", [None, 40])
def test_the_new_keys_and_values_are_in_memory_afterwards_and_nothing_else_changed(
    backend: str, window: int | None
) -> None:
    p = problem([0, 5, gpu.CHUNK + 70], 4, 2, 16)
    keys, values = p.keys.clone(), p.values.clone()
    decode_attention(p.q, p.k, p.v, keys, values, p.positions, window=window, backend=backend)
    for memory, before, new in ((keys, p.keys, p.k), (values, p.values, p.v)):
        expected = before.clone()
        expected[torch.arange(3), :, p.positions] = new
        assert torch.equal(memory.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_positions_may_lie_apart_in_memory(backend: str) -> None:
    p = problem([30, 20, 10], 2, 1, 16)
    p.positions = torch.stack([p.positions, torch.zeros_like(p.positions)], 1)[:, 0]
    assert_as_accurate("out", p.run(backend=backend), p.truth(torch.float32), p.truth(torch.float64))


def test_a_sequence_does_not_depend_on_the_others(backend: str) -> None:
    """Bit for bit, alone or beside others, whatever the memory's size. (Not the reference: a batched product.)"""
    p = problem([30, 600, 8, 100], 4, 2, 32)
    together = p.run(backend=backend)
    for i in range(4):
        alone = p.run(slice(i, i + 1), backend=backend)
        if backend == "reference":
            assert torch.allclose(alone, together[i : i + 1], atol=1e-6)
        else:
            assert torch.equal(alone, together[i : i + 1])


def test_span_bounds_what_is_read(backend: str) -> None:
    p = problem([30, 8], 4, 2, 32, spare=1000)
    assert torch.allclose(p.run(backend=backend), p.run(backend=backend, span=31), atol=1e-6)


def test_a_nan_among_the_live_keys_shows(backend: str) -> None:
    p = problem([30, 8], 2, 1, 16)
    p.keys[0, 0, 3] = NAN
    out = p.run(backend=backend)
    assert out[0].isnan().all() and out[1].isfinite().all()


def test_rows_of_memory_beyond_the_sequences_are_left_alone(backend: str) -> None:
    p = problem([3, 4], 2, 1, 16)
    keys, values = (torch.cat([x, torch.full_like(x, 7.0)]) for x in (p.keys, p.values))
    out = decode_attention(p.q, p.k, p.v, keys, values, p.positions, backend=backend)
    assert torch.equal(out, p.run(backend=backend))
    assert (keys[2:] == 7).all() and (values[2:] == 7).all()


def test_no_sequences(backend: str) -> None:
    p = problem([3], 2, 1, 16)
    assert p.run(slice(0, 0), backend=backend).shape == (0, 2, 16)


def test_opcheck() -> None:
    p = problem([3, 9], 4, 2, 16)
    p.keys.nan_to_num_(0.0)
    p.values.nan_to_num_(0.0)
    name = "reference" if DEVICE == "cuda" else "native"
    arguments = (p.q, p.k, p.v, p.keys, p.values, p.positions, 0.25, None, None, 12, name)
    torch.library.opcheck(torch.ops.fastppo.decode_attention.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 2, 8)}, "k must have shape"),
        ({"values": torch.zeros(2, 2, 12, 8)}, "values must have shape"),
        ({"positions": torch.zeros(2)}, "positions must be int64"),
        ({"positions": torch.zeros(3, dtype=torch.int64)}, "positions must have shape"),
        ({"positions": torch.tensor([0, 13])}, "positions must lie in"),
        ({"positions": torch.tensor([-1, 3])}, "positions must lie in"),
        ({"span": 14}, "span must be in"),
        ({"window": 0}, "window must be >= 1"),
        ({"scale": 0.0}, "scale must be finite and > 0"),
        ({"softcap": 0.0}, "softcap > 0"),
        ({"q": torch.zeros(2, 3, 16)}, "must be a multiple"),
        ({"keys": torch.zeros(2, 2, 16, 13).transpose(2, 3)}, "one after the other"),
        ({"k": torch.zeros(2, 2, 16, dtype=torch.bfloat16)}, "k must have the dtype"),
        ({"keys": torch.zeros(1, 2, 13, 16), "values": torch.zeros(1, 2, 13, 16)}, "as many rows"),
    ],
)
def test_bad_input_says_what_is_wrong(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"q": torch.zeros(2, 4, 16), "k": torch.zeros(2, 2, 16), "v": torch.zeros(2, 2, 16)}
    good |= {"keys": torch.zeros(2, 2, 13, 16), "values": torch.zeros(2, 2, 13, 16)}
    with pytest.raises(ValueError, match=message):
        arguments: dict[str, Any] = good | {"positions": torch.tensor([3, 12])} | change
        decode_attention(**arguments, backend="native")


def test_frequencies_of_a_known_case() -> None:
    """Two keys, scores ln 3 apart: weights 3/4 and 1/4."""
    q, v = torch.tensor([[[math.log(3.0)]]], device=DEVICE), torch.tensor([[[0.0]]], device=DEVICE)
    keys, values = torch.tensor([1.0, NAN], device=DEVICE), torch.tensor([8.0, NAN], device=DEVICE)
    memory = (keys.view(1, 1, 2, 1), values.view(1, 1, 2, 1))
    out = decode_attention(q, torch.zeros_like(v), v, *memory, torch.tensor([1], device=DEVICE))
    assert float(out) == pytest.approx(6.0, rel=1e-6)
