"""Row kernels: the objective from logits with its gradient, log-probs alone, and their backward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastppo_kernels import gpu
from fastppo_kernels.reference import PPORows
from fastppo_kernels.settings import HeadSettings, PPOSettings
from gate.entry import EVERYWHERE, SERVERS, Budget, Entry

R, VOCAB = 2, 128256
SETTINGS = PPOSettings(kl_coef=0.1, dual_clip=3.0)
ENTROPY_SETTINGS = PPOSettings(kl_coef=0.1, dual_clip=3.0, entropy_coef=0.01)


def per_thread(arguments: dict[str, Any]) -> int:
    """Columns that a thread takes per turn of the loop."""
    return arguments["LANE"] * arguments["REPS"]


def padded(vocab_size: int, dtype: torch.dtype, multiple: int = 64) -> Tensor:
    """(R, V) logits whose rows start at multiples of `multiple` elements."""
    return torch.zeros(R, -(-vocab_size // multiple) * multiple, dtype=dtype)[:, :vocab_size]


def half_view(logits: Tensor) -> Tensor:
    """bfloat16 over float32 logits, row on row."""
    return logits.as_strided((R, logits.stride(0)), logits.stride()).view(torch.bfloat16)[:, : logits.shape[1]]


def vectors() -> tuple[Tensor, PPORows]:
    """Targets, and every vector of the objective."""
    return torch.zeros(R, dtype=torch.int64), PPORows(*(torch.ones(R) for _ in PPORows._fields))


def ppo(logits: Tensor, dlogits: Tensor, *, entropy: bool, softcap: float | None = None, split: bool = False) -> None:
    """One launch of the objective."""
    targets, rows = vectors()
    head, settings = HeadSettings(temperature=0.6, softcap=softcap), ENTROPY_SETTINGS if entropy else SETTINGS
    gpu.ppo_rows(logits, targets, rows, settings, head, entropy=entropy, dlogits=dlogits, split=split)


def row_entry(
    name: str, call: Callable[[], object], per_element: float, targets: tuple[str, ...] = SERVERS, **limits: Any
) -> Entry:
    """An entry whose instructions per element are counted on sm_90."""
    budget = Budget(per_element={"sm_90": per_element}, **limits)
    return Entry(name=name, call=call, budget=budget, elements=per_thread, targets=targets)


def objectives() -> list[Entry]:
    """The objective over types, overlap, entropy and soft-cap: at most 15 instructions, or 18 with entropy."""
    found = []
    for entropy, limit, capped_limit in ((False, 15, 44), (True, 18, 48)):
        suffix = " entropy" if entropy else ""
        for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            x = padded(VOCAB, dtype)
            call = lambda x=x, e=entropy: ppo(x, x, entropy=e)  # noqa: E731
            found.append(row_entry(f"ppo {short} in place{suffix}", call, limit))
        x, ragged = padded(VOCAB, torch.float32), padded(VOCAB - 1, torch.bfloat16)
        over = lambda x=x, e=entropy: ppo(x, half_view(x), entropy=e)  # noqa: E731
        found.append(row_entry(f"ppo bf16 over fp32{suffix}", over, limit, EVERYWHERE, barrier_before_stores=True))
        fresh = lambda x=x, e=entropy: ppo(x, padded(VOCAB, torch.bfloat16), entropy=e)  # noqa: E731
        found.append(row_entry(f"ppo fp32 to bf16{suffix}", fresh, limit))
        odd = lambda x=ragged, e=entropy: ppo(x, x, entropy=e)  # noqa: E731
        found.append(row_entry(f"ppo bf16 ragged vocab{suffix}", odd, limit))
        capped = lambda x=x, e=entropy: ppo(x, half_view(x), entropy=e, softcap=30.0)  # noqa: E731
        found.append(row_entry(f"ppo bf16 over fp32 softcap{suffix}", capped, capped_limit, barrier_before_stores=True))
    return found


def log_probs() -> list[Entry]:
    """Log-probs alone, their backward, and rows shared by several programs."""
    targets, _ = vectors()
    half, full, plain = padded(VOCAB, torch.bfloat16), padded(VOCAB, torch.float32), HeadSettings(temperature=0.6)
    fp16 = padded(VOCAB, torch.float16)

    def backward() -> None:
        gpu.logprob_rows_backward(half, targets, torch.ones(R), torch.ones(R), plain, dlogits=half, split=False)

    return [
        row_entry(
            "logprob bf16", lambda: gpu.logprob_rows(half, targets, plain, entropy=False, split=False), 8, EVERYWHERE
        ),
        row_entry(
            "logprob fp32 entropy", lambda: gpu.logprob_rows(full, targets, plain, entropy=True, split=False), 9.5
        ),
        row_entry("logprob bf16 split", lambda: gpu.logprob_rows(half, targets, plain, entropy=False, split=True), 8),
        row_entry("backward bf16 entropy", backward, 18),
        row_entry("ppo bf16 split entropy", lambda: ppo(half, half, entropy=True, split=True), 10),
        row_entry("ppo fp16 in place entropy", lambda: ppo(fp16, fp16, entropy=True), 18, ("sm_90", "gfx942")),
    ]


def small() -> list[Entry]:
    """Vocabularies of one block: no loop to count in, and all of the row stored over itself."""
    x, wide = padded(1000, torch.bfloat16), padded(8000, torch.float32)
    over = Budget(barrier_before_stores=True)
    return [
        Entry(name="ppo bf16 V=1000", call=lambda: ppo(x, x, entropy=True)),
        Entry(name="ppo bf16 over fp32 V=8000", call=lambda: ppo(wide, half_view(wide), entropy=True), budget=over),
    ]


ENTRIES = [*objectives(), *log_probs(), *small()]
