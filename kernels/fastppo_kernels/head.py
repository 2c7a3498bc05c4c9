"""LM-head logits one chunk of rows at a time: no (R, V) tensor exists, and one buffer serves every chunk.

    z = cap * tanh((h W^T + b) / cap) / T      p = softmax(z)      H = -sum_v p_v log p_v
    dlogits_v = (c ([v = y] - p_v) - e p_v (log p_v + H)) (1 - tanh^2) / T     for d log p_y = c and dH = e

The logits become p and then dlogits in the buffer that the product was written to. The factor -c / T of a row is not
multiplied into its V columns but into the H columns on the other side of the two products that follow.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo_kernels.linear import product, runs_onednn
from fastppo_kernels.reference import working_dtype
from fastppo_kernels.settings import HeadSettings

# Bytes of a chunk's float32 logits. CPU: within the last-level cache (1, 4 and 16 MiB take the same time on a free
# core), and large, because every chunk costs some joins of the threads. GPU: enough rows for full matrix products.
CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 1 << 30}
MIN_CHUNK_ROWS = 32  # below this the products are bound by reading the weight, on either device


def default_chunk_size(vocab_size: int, device: torch.device) -> int:
    """Rows per chunk, from V and the device alone, so that R does not change how a row is computed."""
    return max(MIN_CHUNK_ROWS, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (4 * vocab_size))


class Softmax(NamedTuple):
    """What is known of a chunk of C rows once its logits were overwritten with probabilities."""

    p: Tensor  # (C, V), the buffer
    logprobs: Tensor  # (C,)
    entropy: Tensor | None  # (C,)
    log_p: Tensor | None  # (C, V), only with entropy
    slope: Tensor | None  # (C, V), derivative of the soft-cap


def softmax_(logits: Tensor, targets: Tensor, head: HeadSettings, *, entropy: bool, temperature_done: bool) -> Softmax:
    """Turns (C, V) logits into probabilities, in place, and picks the targets' log-probabilities.

    The maximum is subtracted from the target's logit before anything else, so a common offset of the logits costs no
    accuracy; log sum exp(z - max) is -log of the largest probability.
    """
    slope = None
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_()
        slope = 1.0 - logits.square()
        logits.mul_(head.softcap)
    if head.temperature != 1.0 and not temperature_done:
        logits.div_(head.temperature)
    picked = logits.gather(1, targets[:, None]).squeeze(1) - logits.amax(1)
    p = torch.softmax(logits, dim=1, out=logits)
    logprobs = picked + p.amax(1).log()
    if not entropy:
        return Softmax(p, logprobs, None, None, slope)
    log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log_()  # 0 log 0 = 0
    return Softmax(p, logprobs, -torch.linalg.vecdot(p, log_p), log_p, slope)


def dlogits_(
    chunk: Softmax, targets: Tensor, dlogprobs: Tensor, dentropy: Tensor | None, head: HeadSettings
) -> tuple[Tensor, Tensor]:
    """Overwrites the probabilities with d such that dlogits = scale[:, None] * d; returns (d (C, V), scale (C,))."""
    d, column = chunk.p, targets[:, None]
    scale, at_target = -dlogprobs / head.temperature, torch.ones_like(dlogprobs)
    if dentropy is not None:
        assert chunk.log_p is not None and chunk.entropy is not None
        offset = dlogprobs + dentropy * chunk.entropy
        d.mul_(torch.addcmul(offset[:, None], chunk.log_p, dentropy[:, None], out=chunk.log_p))
        scale, at_target = torch.full_like(dlogprobs, -1.0 / head.temperature), dlogprobs
    d.scatter_add_(1, column, -at_target[:, None])
    if chunk.slope is not None:
        d.mul_(chunk.slope)
    return d, scale


class ChunkedHead:
    """Products of the LM head with chunks of hidden states, and the gradients of both (and of the bias).

    On the CPU every operand is converted to the working dtype once; on a GPU bfloat16 and float16 operands are
    multiplied as they are and accumulated and returned in float32. Gradients are accumulated in the working dtype.
    """

    def __init__(
        self,
        hidden: Tensor,  # (R, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        head: HeadSettings,
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
        self.head, self.logits_dtype = head, logits_dtype
        self.chunk_size = chunk_size or default_chunk_size(weight.shape[0], hidden.device)
        self.onednn = runs_onednn(self.hidden)
        rows = 0 if self.onednn else min(self.chunk_size, hidden.shape[0])
        self.buffer = torch.empty(rows, weight.shape[0], dtype=self.dtype, device=hidden.device)
        self.dhidden = torch.empty_like(hidden, dtype=self.dtype) if wanted[0] else None
        # (V, H); laid out as (H, V) where that is how its products come
        self.dweight = weight.new_zeros(weight.shape[::-1], dtype=self.dtype).T if wanted[1] and self.onednn else None
        if wanted[1] and not self.onednn:
            self.dweight = torch.zeros_like(weight, dtype=self.dtype)
        self.dbias = torch.zeros_like(self.bias) if wanted[2] and self.bias is not None else None

    def chunks(self) -> Iterator[slice]:
        """The slices of rows, in order."""
        num_rows = self.hidden.shape[0]
        for start in range(0, num_rows, self.chunk_size):
            yield slice(start, min(start + self.chunk_size, num_rows))

    def softmax(self, rows: slice, targets: Tensor, *, entropy: bool) -> Softmax:
        """Logits of a chunk in the buffer, then `softmax_`; the temperature goes to the small operand if it can."""
        early = self.head.softcap is None and self.bias is None and self.operand_dtype == self.dtype
        hidden = self.hidden[rows] / self.head.temperature if early else self.hidden[rows]
        logits = self.buffer[: hidden.shape[0]]
        if self.onednn:
            logits = product(hidden, self.weight)
        elif self.operand_dtype == self.dtype:
            torch.mm(hidden, self.weight.T, out=logits)
        else:
            logits.copy_(torch.mm(hidden, self.weight.T, out_dtype=self.dtype))
        if self.bias is not None:
            logits.add_(self.bias)
        if self.logits_dtype != torch.float32:
            logits.copy_(logits.to(self.logits_dtype))
        return softmax_(logits, targets[rows], self.head, entropy=entropy, temperature_done=early)

    def accumulate(self, rows: slice, d: Tensor, scale: Tensor) -> None:
        """Adds the gradients of a chunk whose dlogits are scale[:, None] * d."""
        scale = scale[:, None]
        if self.dbias is not None:
            self.dbias.addmv_(d.T, scale.squeeze(1))
        if self.onednn:
            self._accumulate_onednn(rows, d, scale)
            return
        if self.operand_dtype != self.dtype:
            self._accumulate_mixed(rows, (d * scale).to(self.operand_dtype))
            return
        if self.dhidden is not None:
            torch.mm(d, self.weight, out=self.dhidden[rows]).mul_(scale)
        if self.dweight is not None:
            self.dweight.addmm_(d.T, self.hidden[rows] * scale)

    def _accumulate_onednn(self, rows: slice, d: Tensor, scale: Tensor) -> None:
        if self.dhidden is not None:
            self.dhidden[rows] = product(d, self.weight.T).mul_(scale)
        if self.dweight is not None:
            self.dweight.T.add_(product((self.hidden[rows] * scale).T, d.T))

    def _accumulate_mixed(self, rows: slice, dlogits: Tensor) -> None:
        if self.dhidden is not None:
            self.dhidden[rows] = torch.mm(dlogits, self.weight, out_dtype=self.dtype)
        if self.dweight is not None:
            self.dweight.add_(torch.mm(dlogits.T, self.hidden[rows], out_dtype=self.dtype))
