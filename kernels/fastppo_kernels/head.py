"""The LM head one chunk of rows at a time: no (R, V) tensor exists, and one buffer serves every chunk.

Logits are made in float32 and overwritten by their gradient, in the dtype of the operands, in the same memory.

The library of a GPU picks its algorithm by the shape of a product, and with it the order of summation. So there every
product of hidden states or of their gradient has as many rows, the last one padded: a row's bits do not depend on how
many there are. (In the sum over rows that is the weight's gradient they all take part.) On the CPU they do not anyway.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fastppo_kernels import native
from fastppo_kernels.linear import runs_native
from fastppo_kernels.native.halves import HalvedSum
from fastppo_kernels.reference import working_dtype

# Bytes of a chunk's float32 logits, unless that is fewer rows than one of the two below. CPU: what the C library keeps
# when it is freed (`keep_freed_memory`); the memory of more is new pages in every call. GPU: what a chunk costs beyond
# its products is one reading and writing of the weight's gradient, 8 V H bytes, so few chunks.
CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 2 << 30}
MIN_CHUNK_ROWS = 256  # below this, reading the weight and adding to its gradient takes longer than multiplying
WIDE_CHUNK_ROWS = 512  # and so many where the gradient of the weight, if one is made, is as large as their logits
PIECE_ROWS = 1024  # on a GPU: fills an H200 with 128 x 256 tiles when H = 4096, and half of it is what padding costs
STRIDE = 64  # elements: every row of the buffer begins at a multiple of 16 bytes, whatever the vocabulary
TILE_BYTES = 1 << 20  # of a part of the weight's gradient that is added to its sum: so much stays in a core's cache


def default_chunk_size(vocab_size: int, hidden_size: int, device: torch.device) -> int:
    """Rows per chunk, from V, H and the device alone, so that R does not change how a row is computed."""
    least = WIDE_CHUNK_ROWS if hidden_size >= WIDE_CHUNK_ROWS else MIN_CHUNK_ROWS
    rows = max(least, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (4 * vocab_size))
    return _whole_pieces(rows) if pads_products(device) else rows


def pads_products(device: torch.device) -> bool:
    """Whether products there always have as many rows: not on the CPU, whose bits are the same for any number."""
    return device.type != "cpu"


@cache
def keep_freed_memory() -> None:
    """Lets the C library keep up to 64 MB that it has free, for the logits of the next call.

    glibc gives memory back where more is free than twice the largest mapped block it ever freed, of 32 MB at most, and
    maps blocks that are larger: here it frees one of 32 MB, once in a process. The logits of every call are else 4096
    new pages, to be filled with zeros first. Where these limits are set in the environment, or the C library is another
    one, nothing changes.
    """
    bytearray((32 << 20) - (1 << 14))


@contextmanager
def exact_products(x: Tensor) -> Iterator[None]:
    """Context of the products: autocast does not reach them, and no partial sum is rounded to bfloat16 or float16.

    Float32 operands on a GPU follow `torch.set_float32_matmul_precision`, as everywhere.
    """
    matmul = torch.backends.cuda.matmul
    names = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16")]
    before = {name: (getattr(matmul, name), getattr(matmul, f"{name}_split_k", True)) for name in names}
    try:
        for name, (_, split_k) in before.items():
            setattr(matmul, name, (False, split_k))
        with torch.autocast(x.device.type, enabled=False):
            yield
    finally:
        for name, allowed in before.items():
            setattr(matmul, name, allowed)


class ChunkedHead:
    """Products of the LM head with chunks of hidden states, and the gradients of both (and of the bias).

    On the CPU the product of float32 and bfloat16 operands converts what it packs, others are converted whole; on a GPU
    bfloat16 and float16 operands are multiplied as they are and accumulated in float32. The weight's gradient is
    accumulated in the working dtype; in C++ a bfloat16 one is rounded in place. Both the products and the row kernels
    between them belong inside `exact_products`.
    """

    def __init__(
        self,
        hidden: Tensor,  # (R, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        *,
        chunk_size: int | None,
        backend: str,
        wanted: tuple[bool, bool, bool] = (False, False, False),  # gradients of hidden, weight, bias
    ) -> None:
        self.dtype = working_dtype(hidden)
        common = torch.promote_types(hidden.dtype, weight.dtype)
        self.operand_dtype = common if hidden.device.type != "cpu" else self.dtype
        self.bias = None if bias is None else bias.to(self.dtype)
        self.chunk_size = chunk_size or default_chunk_size(weight.shape[0], weight.shape[1], hidden.device)
        self.piece = 0  # rows of every product; 0: as many as there are
        if pads_products(hidden.device):
            self.piece, self.chunk_size = min(PIECE_ROWS, self.chunk_size), _whole_pieces(self.chunk_size)
        multiplies = backend != "reference" and self.dtype == torch.float32 and runs_native(hidden, weight)
        self.native = multiplies and not self.piece
        self.mixed = self.operand_dtype != self.dtype
        self.hidden, self.weight = hidden, weight if self.native else weight.to(self.operand_dtype)
        vocab_size, num_rows = weight.shape[0], hidden.shape[0]
        rows, stride = self._padded(min(self.chunk_size, num_rows)), _padded_columns(vocab_size)
        if self.native:
            keep_freed_memory()
        self.buffer = torch.empty(rows, stride, dtype=self.dtype, device=hidden.device)[:, :vocab_size]
        shape = self._padded(num_rows), hidden.shape[1]
        self.dhidden = hidden.new_empty(shape, dtype=self.operand_dtype) if wanted[0] else None
        self.dweight = self._weight_sum(weight, backend) if wanted[1] else None
        self.dbias = torch.zeros_like(self.bias) if wanted[2] and self.bias is not None else None

    def chunks(self) -> Iterator[slice]:
        """The slices of rows, in order."""
        num_rows = self.hidden.shape[0]
        for start in range(0, num_rows, self.chunk_size):
            yield slice(start, min(start + self.chunk_size, num_rows))

    def logits(self, rows: slice) -> Tensor:
        """(C, V) logits of a chunk in the working dtype, overwritten by those of the next."""
        num_rows = rows.stop - rows.start
        if self.native:
            return native.matmul(self.hidden[rows], self.weight.T, self.bias, out=self.buffer[:num_rows])
        for piece, place in self._pieces(rows):
            _multiply(self._hidden(piece), self.weight.T, self.buffer[place])
        logits = self.buffer[:num_rows]
        return logits if self.bias is None else logits.add_(self.bias)

    def dlogits(self, logits: Tensor) -> Tensor:
        """Where the gradient of a chunk goes: over the logits, row by row, in the dtype that is multiplied next."""
        return logits.view(self.operand_dtype)[:, : logits.shape[1]] if self.mixed else logits

    def accumulate(self, rows: slice) -> None:
        """Adds the gradients of a chunk, whose logits have been overwritten by theirs where `dlogits` says."""
        dlogits = self.dlogits(self.buffer[: rows.stop - rows.start])
        if self.dbias is not None:
            self.dbias.add_(dlogits.sum(0, dtype=self.dtype))
        if self.dhidden is not None and self.native:
            native.matmul(dlogits, self.weight, out=self.dhidden[rows])
        elif self.dhidden is not None:
            padded = self.dlogits(self.buffer)  # and with rows of padding below, whose gradient is not looked at
            for piece, place in self._pieces(rows):
                _multiply(padded[place], self.weight, self.dhidden[piece])
        if self.dweight is not None:
            self._accumulate_weight(self.dweight, rows, dlogits)

    def gradients(self, *inputs: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Of hidden, weight and bias, in the dtypes of these `inputs`; of no element where not wanted.

        Comes last: the buffer and a copy of the weight are freed first, so that gradients of another dtype may take
        their place.
        """
        self.buffer = self.weight = nothing = self.hidden.new_empty(0, dtype=self.operand_dtype)
        dhidden = None if self.dhidden is None else self.dhidden[: self.hidden.shape[0]]
        dweight = self.dweight.rounded() if isinstance(self.dweight, HalvedSum) else self.dweight
        made = zip((dhidden, dweight, self.dbias), inputs, strict=True)
        a, b, c = (nothing.clone() if g is None or x is None else g.to(x.dtype).contiguous() for g, x in made)
        return a, b, c

    def _weight_sum(self, weight: Tensor, backend: str) -> Tensor | HalvedSum:
        """What (V, H) gradients of chunks are added to."""
        if self.native and weight.dtype == torch.bfloat16 and backend == "native":
            return HalvedSum(*weight.shape)
        make = torch.zeros if self.hidden.shape[0] == 0 else torch.empty  # else the first chunk fills it
        return make(weight.shape, dtype=self.dtype, device=weight.device)

    def _accumulate_weight(self, dweight: Tensor | HalvedSum, rows: slice, dlogits: Tensor) -> None:
        if isinstance(dweight, HalvedSum):
            for tile in _tiles(*self.weight.shape):
                dweight.add(tile, native.matmul(dlogits[:, tile].T, self.hidden[rows]))
            return
        if self.native:
            native.matmul(dlogits.T, self.hidden[rows], out=dweight, accumulate=rows.start > 0)
            return
        hidden = self._hidden(rows)
        if rows.start == 0:
            _multiply(dlogits.T, hidden, dweight)
        elif self.mixed:
            torch.addmm(dweight, dlogits.T, hidden, out_dtype=self.dtype, out=dweight)
        else:
            dweight.addmm_(dlogits.T, hidden)

    def _pieces(self, rows: slice) -> Iterator[tuple[slice, slice]]:
        """Rows of every product of a chunk, which may go past the last row, and where they lie in the buffer."""
        step = self.piece or rows.stop - rows.start
        for start in range(rows.start, rows.stop, step):
            place = start - rows.start
            yield slice(start, start + step), slice(place, place + step)

    def _hidden(self, piece: slice) -> Tensor:
        """Hidden states of a piece in the dtype that is multiplied, zeros past the last row."""
        missing = max(piece.stop - self.hidden.shape[0], 0)
        hidden = self.hidden[piece].to(self.operand_dtype)
        return F.pad(hidden, (0, 0, 0, missing)) if missing else hidden

    def _padded(self, num_rows: int) -> int:
        """So many rows and what the padding adds."""
        return -(-num_rows // self.piece) * self.piece if self.piece else num_rows


def peak_bytes(
    num_rows: int,
    vocab_size: int,
    hidden_size: int,
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    device: torch.device,
    *,
    chunk_size: int | None = None,
    wanted: tuple[bool, bool] = (False, False),
) -> int:
    """Most bytes that a `ChunkedHead` holds at a time: buffer, copies, gradients of hidden and weight (as `wanted`).

    By what it does on a CPU in C++ and on a GPU, for float32 and bfloat16; nothing is allocated.
    """
    cpu, R, V, H = device.type == "cpu", num_rows, vocab_size, hidden_size
    operand = 4 if cpu else max(hidden_dtype.itemsize, weight_dtype.itemsize)
    asked = chunk_size or default_chunk_size(V, H, device)
    chunk, piece = min(asked, R), min(PIECE_ROWS, asked)
    padded = chunk if cpu else -(-chunk // piece) * piece
    converts = weight_dtype.itemsize != operand
    # on the CPU nothing is converted, and a bfloat16 gradient takes the place of its sum, to which tiles are added
    copies = 0 if cpu else operand * (chunk * H * (hidden_dtype.itemsize != operand) + V * H * converts)
    tile = 4 * H * min(V, _tile_rows(H)) * (cpu and wanted[1] and weight_dtype.itemsize != 4)
    logits = 4 * padded * _padded_columns(V)
    dhidden, dweight = operand * R * H * wanted[0], 4 * V * H * wanted[1]
    converted = weight_dtype.itemsize * V * H * (wanted[1] and weight_dtype.itemsize != 4 and not cpu)
    returned = hidden_dtype.itemsize * R * H * (wanted[0] and hidden_dtype.itemsize != operand)
    return dhidden + dweight + max(copies + logits + tile, returned + converted)


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, in the dtype of `out`."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _whole_pieces(chunk_size: int) -> int:
    return chunk_size - chunk_size % min(PIECE_ROWS, chunk_size)


def _padded_columns(vocab_size: int) -> int:
    return -(-vocab_size // STRIDE) * STRIDE


def _tiles(length: int, other: int) -> Iterator[slice]:
    """Slices of 0..length such that float32 (slice, other) has about TILE_BYTES."""
    step = _tile_rows(other)
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _tile_rows(width: int) -> int:
    return max(64, TILE_BYTES // (4 * width) // 64 * 64)
