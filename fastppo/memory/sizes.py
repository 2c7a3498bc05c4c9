"""What a role has all the time, and what optimizers keep of a weight."""

from dataclasses import dataclass

SMALLEST_QUANTIZED = 4096  # numbers of a weight; torchao keeps the moments of smaller ones in float32


@dataclass(frozen=True)
class Sizes:
    """Bytes that a role has all the time."""

    weights: int
    """Of the whole model, a base it shares included."""
    trained: int
    """Of those that learn."""
    gradients: int
    masters: int
    moments: int
    step: int
    """While the optimizer steps, beside gradients: for weights that are stepped one at a time, those of the largest."""
    period: int
    """Not bytes: after how many layers they repeat; 0: they do not."""


def moment_bytes(numel: int, kind: str) -> int:
    """Both moments of one weight: float32, or codes with a float32 scale for each block and a table of values."""
    block, bits = {"adamw-8bit": (256, 8), "adamw-4bit": (128, 4)}.get(kind, (0, 32))
    if not block or numel < SMALLEST_QUANTIZED or numel % block:
        return 8 * numel
    return 2 * (numel * bits // 8 + 4 * (numel // block) + 4 * 2**bits)
