"""Where the actions of packed sequences are. Letters: B sequences, N packed tokens."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Layout(NamedTuple):
    """Where the actions of packed sequences are, (N,) each."""

    sequence: Tensor  # int64, index of the sequence the token belongs to
    is_action: Tensor  # bool
    is_last: Tensor  # bool, the last action of its sequence
    next_action: Tensor  # int64, position of the next action; any number where is_last


def action_layout(cu_seqlens: Tensor, mask: Tensor | None, num_tokens: int) -> Layout:
    """Layout of N packed tokens, with no loop and no host synchronisation."""
    position = torch.arange(num_tokens, device=cu_seqlens.device)
    ends = cu_seqlens[1:].long().contiguous()
    sequence = torch.searchsorted(ends, position, right=True)
    inside = (sequence < ends.numel()) & (position >= cu_seqlens[0])
    is_action = inside if mask is None else inside & mask
    here_or_later = torch.where(is_action, position, num_tokens).flip(0).cummin(0).values.flip(0)
    next_action = F.pad(here_or_later[1:], (0, 1), value=num_tokens)[:num_tokens]
    sequence = sequence.clamp(max=max(ends.numel() - 1, 0))
    end = ends[sequence] if ends.numel() else position
    return Layout(sequence, is_action, is_action & (next_action >= end), next_action.clamp(max=max(num_tokens - 1, 0)))
