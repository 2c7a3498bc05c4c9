"""The same cases under pytest-benchmark, fastppo alone, to compare one commit with another.

    pytest bench/test_bench_ops.py --benchmark-autosave               # then, on another commit:
    pytest bench/test_bench_ops.py --benchmark-compare

On a GPU at the shapes of the scripts, on the CPU at their smallest ones. The scripts themselves measure the peers.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch

from fastppo.bench import arguments, harness
from fastppo.bench.ops import OPS


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bench(benchmark: Any, op: str, dtype: str) -> None:
    """The last case of the op, its outputs held to float64 before it is timed."""
    module = OPS[op]
    argv = ["--dtypes", dtype] + ([] if torch.cuda.is_available() else ["--quick"])
    (case,) = deque(module.cases(arguments.start(module.parser(), argv)), maxlen=1)
    variant = case.variants[harness.OURS]
    harness.check(variant, case)
    benchmark.extra_info.update(op=case.op, **case.setting)
    benchmark.pedantic(_synchronised(variant.run), setup=variant.before, rounds=15, warmup_rounds=2)


def _synchronised(run: Any) -> Any:
    def call() -> None:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return call
