"""Which implementation of an op runs: one rule, visible here, with no fallback."""

import os

BACKEND_VARIABLE = "FASTPPO_BACKEND"


def choose_backend(op: str, backend: str | None, *, native: bool = False) -> str:
    """Name of the implementation that runs: the argument, else the environment variable, else the fastest.

    Args:
        op: name of the op, for the error message.
        backend: what the caller asked for; None leaves the choice to FASTPPO_BACKEND and then to the rule.
        native: whether the C++ library implements this op for the device and dtype at hand.

    Returns:
        "native" (C++, CPU) or "reference" (PyTorch, any device).

    Raises:
        ValueError: the name asked for does not exist for this op on these tensors.
    """
    available = ("native", "reference") if native else ("reference",)
    chosen = backend if backend is not None else os.environ.get(BACKEND_VARIABLE) or available[0]
    if chosen not in available:
        source = "backend" if backend is not None else BACKEND_VARIABLE
        raise ValueError(
            f"{source} = {chosen!r} does not exist for {op} on these tensors; "
            f"available: {', '.join(available)}. Leave it unset to let fastppo_kernels choose."
        )
    return chosen
