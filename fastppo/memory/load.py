"""What goes through a model at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastppo.attention import plan
from fastppo.microbatch import MicroBatch


@dataclass(frozen=True)
class Load:
    """Sequences of one forward, all of one length but for a shorter one that fills it up."""

    sequences: int
    prompt: int
    response: int
    tail: int = 0
    """Tokens of the shorter one; 0: there is none."""

    @property
    def lengths(self) -> list[int]:
        return [self.prompt + self.response] * self.sequences + [self.tail] * (self.tail > 0)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def batch(self, device: torch.device) -> MicroBatch:
        """As `microbatch.gather` makes it for `device`; call it outside the dry run."""
        packing = plan(self.lengths, recurring=True, runs_on=device.type)
        ids, positions = torch.zeros(self.tokens, dtype=torch.int64), positions_of(self.lengths)
        ends = torch.tensor(self.lengths).repeat_interleave(torch.tensor(self.lengths)) - 1
        rows = ((positions >= ends - self.response) & (positions < ends)).nonzero().squeeze(1)
        return MicroBatch(ids, positions, packing, rows, rows, rows, ids)


def positions_of(lengths: Sequence[int]) -> Tensor:
    """Of packed sequences, restarting at each."""
    return torch.cat([torch.arange(n) for n in lengths])
