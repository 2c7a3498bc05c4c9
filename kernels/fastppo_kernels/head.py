"""The LM head one chunk of rows at a time: no (R, V) tensor exists, and one buffer serves every chunk.

Logits are made in float32 and overwritten by their gradient, in the dtype of the operands, in the same memory.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastppo_kernels.linear import add_product, product, product_into, runs_onednn
from fastppo_kernels.reference import working_dtype

# Bytes of a chunk's float32 logits, unless that is fewer than MIN_CHUNK_ROWS. CPU: what the C library keeps when it is
# freed, while two are alive; a larger result of every product is new pages. GPU: enough rows for full matrix products.
CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 1 << 30}
MIN_CHUNK_ROWS = 256  # below this, reading the weight and adding to its gradient takes longer than multiplying
STRIDE = 64  # elements: every row of the buffer begins at a multiple of 16 bytes, whatever the vocabulary


def default_chunk_size(vocab_size: int, device: torch.device) -> int:
    """Rows per chunk, from V and the device alone, so that R does not change how a row is computed."""
    return max(MIN_CHUNK_ROWS, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (4 * vocab_size))


class ChunkedHead:
    """Products of the LM head with chunks of hidden states, and the gradients of both (and of the bias).

    On the CPU every operand is converted to the working dtype once; on a GPU bfloat16 and float16 operands are
    multiplied as they are and accumulated in float32. The weight's gradient is accumulated in the working dtype.
    """

    def __init__(
        self,
        hidden: Tensor,  # (R, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        *,
        chunk_size: int | None,
        wanted: tuple[bool, bool, bool] = (False, False, False),  # gradients of hidden, weight, bias
        logits_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = working_dtype(hidden)
        common = torch.promote_types(hidden.dtype, weight.dtype)
        self.operand_dtype = common if hidden.device.type != "cpu" else self.dtype
        self.hidden, self.weight = hidden.to(self.operand_dtype), weight.to(self.operand_dtype)
        self.bias = None if bias is None else bias.to(self.dtype)
        self.logits_dtype = logits_dtype
        self.chunk_size = chunk_size or default_chunk_size(weight.shape[0], hidden.device)
        self.onednn = runs_onednn(self.hidden)
        self.mixed = self.operand_dtype != self.dtype
        vocab_size = weight.shape[0]
        self.direct = self.onednn and _is_kept(self.chunk_size, vocab_size)  # whatever R is, for equal bits
        rows = 0 if self.direct else min(self.chunk_size, hidden.shape[0])
        stride = vocab_size if self.onednn else -(-vocab_size // STRIDE) * STRIDE  # oneDNN is slow where there are gaps
        self.buffer = torch.empty(rows, stride, dtype=self.dtype, device=hidden.device)[:, :vocab_size]
        self.dhidden = torch.empty_like(self.hidden) if wanted[0] else None
        # (V, H); a small one laid out as (H, V), the way its products come
        self.by_columns = self.onednn and _is_kept(*weight.shape)
        shape = weight.shape[::-1] if self.by_columns else weight.shape
        dweight = weight.new_zeros(shape, dtype=self.dtype) if wanted[1] else None
        self.dweight = dweight.T if dweight is not None and self.by_columns else dweight
        self.dbias = torch.zeros_like(self.bias) if wanted[2] and self.bias is not None else None

    def chunks(self) -> Iterator[slice]:
        """The slices of rows, in order."""
        num_rows = self.hidden.shape[0]
        for start in range(0, num_rows, self.chunk_size):
            yield slice(start, min(start + self.chunk_size, num_rows))

    def logits(self, rows: slice) -> Tensor:
        """(C, V) logits of a chunk in the working dtype, overwritten by those of the next."""
        hidden = self.hidden[rows]
        logits = self.buffer[: hidden.shape[0]]
        if self.direct:
            logits = product(hidden, self.weight, self.bias)
        elif self.onednn:
            product_into(logits, hidden, self.weight, self.bias)
        elif self.mixed:
            torch.mm(hidden, self.weight.T, out_dtype=self.dtype, out=logits)
        else:
            torch.mm(hidden, self.weight.T, out=logits)
        if self.bias is not None and not self.onednn:
            logits.add_(self.bias)
        if self.logits_dtype != torch.float32:
            logits.copy_(logits.to(self.logits_dtype))
        return logits

    def dlogits(self, logits: Tensor) -> Tensor:
        """Where the gradient of a chunk goes: over the logits, row by row, in the dtype that is multiplied next."""
        return logits.view(self.operand_dtype)[:, : logits.shape[1]] if self.mixed else logits

    def accumulate(self, rows: slice, dlogits: Tensor) -> None:
        """Adds the gradients of a chunk."""
        if self.dbias is not None:
            self.dbias.add_(dlogits.sum(0, dtype=self.dtype))
        if self.dhidden is not None and self.onednn:
            self.dhidden[rows] = product(dlogits, self.weight.T)
        elif self.dhidden is not None:
            torch.mm(dlogits, self.weight, out=self.dhidden[rows])
        if self.dweight is not None:
            self._accumulate_weight(self.dweight, self.hidden[rows], dlogits)

    def gradients(self, *inputs: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Of hidden, weight and bias, in the dtypes of these `inputs`; of no element where not wanted."""
        nothing = self.hidden.new_empty(0)
        made = zip((self.dhidden, self.dweight, self.dbias), inputs, strict=True)
        a, b, c = (nothing.clone() if g is None or x is None else g.to(x.dtype).contiguous() for g, x in made)
        return a, b, c

    def _accumulate_weight(self, dweight: Tensor, hidden: Tensor, dlogits: Tensor) -> None:
        if self.by_columns:
            dweight.T.add_(product(hidden.T, dlogits.T))
        elif self.onednn:
            add_product(dweight, dlogits, hidden)
        elif self.mixed:
            torch.addmm(dweight, dlogits.T, hidden, out_dtype=self.dtype, out=dweight)
        else:
            dweight.addmm_(dlogits.T, hidden)


def _is_kept(num_rows: int, num_columns: int) -> bool:
    """Whether the allocator keeps the memory of a float32 matrix for the next one of its size."""
    return 4 * num_rows * num_columns <= CHUNK_BYTES["cpu"]
