"""Keys and values of the sequences that are being sampled: a row of memory each, written and read in place.

An attention layer meets them as the `memory` of a forward pass (`fastppo.attention.packed_attention`). Nothing of a
row outlives the call of `generate` that made it: after an update there is no stale key to be read.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastppo_kernels import decode_attention


def kv_budget(asked: int | None, device: torch.device) -> int | None:
    """Bytes that keys and values may take: those asked for, else on a GPU half of what is free now; None: no limit."""
    if asked is None and device.type == "cuda":
        return free_bytes(device) // 2
    return asked


def free_bytes(device: torch.device) -> int:
    """Bytes of a GPU that can be allocated: what the driver has, and what torch's allocator keeps without using it."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


@dataclass
class KVRows:
    """Memory of `num_rows` sequences of up to `num_positions` tokens; a layer's is made when it first writes."""

    num_rows: int
    num_positions: int
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # (rows, kv_heads, positions, D) each

    def memory(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer whose tokens have (N, kv_heads, D) like these."""
        if layer not in self.layers:
            made = (x.new_empty(self.num_rows, x.shape[1], self.num_positions, x.shape[2]) for x in (key, value))
            self.layers[layer] = (next(made), next(made))
        return self.layers[layer]

    def write(self, layer: int, rows: Tensor, positions: Tensor, key: Tensor, value: Tensor) -> None:
        """Put (N, kv_heads, D) where `rows` and `positions`, (N,) each, say."""
        for memory, new in zip(self.memory(layer, key, value), (key, value), strict=True):
            memory[rows, :, positions] = new

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
        """Keeps k and v but those of padding; the prompts attend to themselves."""
        n = len(self.rows)
        self.kv.write(layer, self.rows, self.positions, k[:n], v[:n])
        return None


@dataclass(frozen=True)
class Decode:
    """A forward pass over one token of each of the first n rows."""

    kv: KVRows
    positions: Tensor  # (n,) int64
    span: int  # positions that are read, more than any of them

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None,
        softcap: float | None,
    ) -> Tensor | None:  # fmt: skip
        """(n, heads, D) from q (n, heads, D) and k, v (n, kv_heads, D)."""
        keys, values = self.kv.memory(layer, k, v)
        return decode_attention(
            q, k, v, keys, values, self.positions, scale=scaling, window=window, softcap=softcap, span=self.span
        )
