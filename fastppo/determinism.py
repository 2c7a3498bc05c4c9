"""The same bits every time: what PyTorch has to be told, and put back afterwards.

On a CPU everything here gives the same bits for one number of threads without it. On a GPU it makes index and scatter
kernels, cuBLAS and the backward pass of attention deterministic; an operation that has no such kernel raises.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastppo.checks import require

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
LEGAL = (":4096:8", ":16:8")


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Within it only deterministic operations run, if `wanted`.

    Raises:
        ValueError: cuBLAS was told otherwise, or is in use already.
    """
    if not wanted:
        yield
        return
    given = os.environ.get(WORKSPACE)
    started = torch.cuda.is_available() and torch.cuda.is_initialized()
    require(given in (None, *LEGAL), f"deterministic = true needs {WORKSPACE} to be one of {LEGAL}, got {given!r}")
    require(
        given is not None or not started,
        f"deterministic = true needs {WORKSPACE}={LEGAL[0]} before CUDA is first used, and it is in use: export it",
    )
    os.environ[WORKSPACE] = given or LEGAL[0]
    cudnn: Any = torch.backends.cudnn
    fill: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    flags = cudnn.deterministic, cudnn.benchmark, fill.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    fill.fill_uninitialized_memory = False  # nothing here reads what was not written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark, fill.fill_uninitialized_memory = flags
        if given is None:
            del os.environ[WORKSPACE]
