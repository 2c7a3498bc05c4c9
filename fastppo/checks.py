"""Shared one-line checks of user input; each raises a ValueError that says what was got and what is legal."""

import math
from typing import Any


class InputError(ValueError):
    """What the user gave cannot be used, and the message says all there is to say. Any other ValueError is a bug."""


class RolloutError(RuntimeError):
    """Sampling failed, or what was sampled is not the policy's; the message says all there is to say."""


def require(condition: bool, message: str) -> None:
    """Raise `InputError(message)` unless `condition` holds."""
    if not condition:
        raise InputError(message)


def require_positive(section: str, config: Any, *names: str) -> None:
    """Every named field is > 0, finite and not NaN; None (a switched-off option) passes."""
    for name in names:
        value = getattr(config, name)
        require(value is None or 0 < value < math.inf, f"{section}.{name} must be > 0 and finite, got {value}")


def require_unit(section: str, config: Any, *names: str) -> None:
    """Every named field lies in [0, 1]."""
    for name in names:
        value = getattr(config, name)
        require(0 <= value <= 1 and math.isfinite(value), f"{section}.{name} must be in [0, 1], got {value}")
