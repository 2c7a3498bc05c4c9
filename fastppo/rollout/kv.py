"""Keys and values of the sequences that are being sampled: a row of memory each, written and read in place.

An attention layer meets them as the `memory` of a forward pass (`fastppo.attention.packed_attention`). Nothing of a
row outlives the call of `generate` that made it: after an update there is no stale key to be read.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class KVRows:
    """Memory of `num_rows` sequences of up to `num_positions` tokens; a layer's is made when it first writes."""

    num_rows: int
    num_positions: int
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # (rows, kv_heads, positions, D) each

    def write(self, layer: int, rows: Tensor, positions: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put (N, kv_heads, D) where `rows` and `positions`, (N,) each, say; returns all of the layer's memory."""
        if layer not in self.layers:  # zeros: what is masked must not be NaN
            made = (x.new_zeros(self.num_rows, x.shape[1], self.num_positions, x.shape[2]) for x in (key, value))
            self.layers[layer] = (next(made), next(made))
        for memory, new in zip(self.layers[layer], (key, value), strict=True):
            memory[rows, :, positions] = new
        return self.layers[layer]

    def copy(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Rows `targets` become `sources`, up to `length` positions."""
        for memories in self.layers.values():
            for memory in memories:
                memory[targets, :, :length] = memory[sources, :, :length]


@dataclass(frozen=True)
class Prefill:
    """A forward pass over whole prompts, whose keys and values are kept."""

    kv: KVRows
    rows: Tensor  # (N,) int64, the row of each token
    positions: Tensor  # (N,) int64

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None,
        softcap: float | None,
    ) -> Tensor | None:  # fmt: skip
        """Keeps k and v; the prompts attend to themselves."""
        self.kv.write(layer, self.rows, self.positions, k, v)
        return None


@dataclass(frozen=True)
class Decode:
    """A forward pass over one token of each of the first n rows."""

    kv: KVRows
    positions: Tensor  # (n,) int64
    span: int  # positions that are read, more than any of them
    masks: dict[int | None, Tensor] = field(default_factory=dict)  # by window, the same for all layers

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None,
        softcap: float | None,
    ) -> Tensor | None:  # fmt: skip
        """(n, heads, D) from q (n, heads, D) and k, v (n, kv_heads, D)."""
        n, heads, D = q.shape
        rows = torch.arange(n, device=q.device)
        keys, values = (x[:n, :, : self.span] for x in self.kv.write(layer, rows, self.positions, k, v))
        grouped = q.view(n, k.shape[1], heads // k.shape[1], D)  # heads that share keys: rows of one product
        mask = self._mask(window)
        if softcap is None:
            out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scaling)
        else:
            scores = (grouped @ keys.transpose(2, 3)) * (D**-0.5 if scaling is None else scaling)
            scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, float("-inf"))
            out = scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype) @ values
        return out.reshape(n, heads, -1)

    def _mask(self, window: int | None) -> Tensor:
        """(n, 1, 1, span), True where a row looks."""
        if window not in self.masks:
            distance = self.positions[:, None] - torch.arange(self.span, device=self.positions.device)
            seen = (distance >= 0) & (distance < (self.span if window is None else window))
            self.masks[window] = seen[:, None, None]
        return self.masks[window]
