"""Does --compare see a slow-down of 1.3x, and nothing in a rerun? On real measurements, several times.

    python bench/check_compare.py [--times 10] [--ops linear_ppo_loss] [--seconds 4] [options of the op]

Each time two files are measured as they are, and one in which every call of fastppo's lasts 1.3 times as long: after it
the process waits, busy, for 0.3 times what it took. Exit code 1 unless all of them were judged right.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastppo.bench import arguments, compare, harness, records
from fastppo.bench.ops import OPS


def slowed(run: Callable[[], Any], factor: float) -> Callable[[], Any]:
    """`run`, and then other work until `factor` times its own time is over."""
    a = torch.randn(256, 256)
    out = torch.empty_like(a)

    def slow() -> Any:
        start = time.perf_counter()
        made = run()
        end = start + factor * (time.perf_counter() - start)
        while time.perf_counter() < end:
            torch.mm(a, a, out=out)
        return made

    return slow


def cases(op: str, options: argparse.Namespace, factor: float) -> Iterator[harness.Case]:
    for case in OPS[op].cases(options):
        ours = case.variants[harness.OURS]
        assert isinstance(ours, harness.Variant)
        yield replace(case, variants={harness.OURS: replace(ours, run=slowed(ours.run, factor))})


def measured(path: Path, ops: list[str], argv: list[str], factor: float = 1.0) -> Path:
    for op in ops:
        options = arguments.start(OPS[op].parser(), [*argv, "--device", "cpu", "--out", str(path)])
        for case in cases(op, options, factor):
            harness.measure(case, options)
    return path


def main() -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--times", type=int, default=10)
    made.add_argument("--ops", nargs="+", choices=OPS, default=["linear_ppo_loss"])
    made.add_argument("--seconds", default="4")
    made.add_argument("--factor", type=float, default=1.3)
    options, others = made.parse_known_args()
    argv, silent, caught = ["--seconds", options.seconds, "--repeats", "40", "--dtypes", "float32", *others], 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for i in range(options.times):
            files = (Path(folder) / f"{i}-{name}.jsonl" for name in ("old", "again", "slow"))
            factors = (1.0, 1.0, options.factor)
            old, again, slow = (measured(f, options.ops, argv, x) for f, x in zip(files, factors, strict=True))
            print(f"\n--- {i + 1}: rerun, then {options.factor}x")
            before, after = (compare.times_of(records.read(file)) for file in (old, again))
            compare.compare(old, again, 1.1)
            silent += not any(c.moved for c in compare.changes(before, after))  # nor told as faster
            caught += compare.compare(old, slow, 1.1) == len(before)
    print(f"\nsilent on a rerun: {silent} of {options.times}; every op caught: {caught} of {options.times}")
    return int(not silent == caught == options.times)


if __name__ == "__main__":
    sys.exit(main())
