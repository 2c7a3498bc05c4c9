"""Resident memory and open files of a long small run on the CPU, which must not grow.

    python bench/flat_memory.py --steps 300

Prints both every 25 iterations. Exit code 1 if memory at any of them after iteration 50 is more than 1 % above what it
was then, or the number of open files differs. Checkpoints, evaluations and kept rollouts are a part of the run.

For each shape of a bfloat16 product oneDNN, and PyTorch once more, keep a compiled kernel, some 0.27 MB, up to 1024 of
each: a run pads its products to sizes that recur (`fastppo.attention.common_size`), or they would go on growing.
`--leak-kib 128` keeps a tensor of that size in every iteration: the check must fail.
"""

import argparse
import ctypes
import gc
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))
EVERY, SETTLED = 25, 50


def resident_kib() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmRSS:")[1].split()[0])


def measure(folder: Path, steps: int, leak_kib: int) -> list[tuple[int, int, int]]:
    """(iteration, KiB resident, open files), every `EVERY` iterations."""
    import torch

    import runs
    from fastppo import trainer

    found: list[tuple[int, int, int]] = []
    leak: list[torch.Tensor] = []
    log: Callable[..., None] = trainer.log

    def logged(run: Any, step: int, *rest: Any) -> None:
        log(run, step, *rest)
        runs.calls.clear()  # the reward function of the tests remembers what it was asked
        leak.append(torch.ones(leak_kib * 256))
        if step % EVERY == 0:
            run.writer.wait()
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what the allocator holds free is not ours
            found.append((step, resident_kib(), len(os.listdir("/proc/self/fd"))))
            print(f"{found[-1][0]:5} {found[-1][1]:9} KiB {found[-1][2]:4} open files", flush=True)

    trainer.log = logged
    training = {"total_steps": steps, "eval_every": 20, "save_every": 10, "keep_best": True}
    trainer.train(runs.config(folder, train=training, policy_optimizer={"lr": 1e-5}))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--leak-kib", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = [row for row in measure(Path(folder), args.steps, args.leak_kib) if row[0] >= SETTLED]
    (_, memory, files), *later = found
    growth = max(row[1] for row in later) / memory - 1
    print(f"growth after iteration {SETTLED}: {growth:+.2%} of {memory} KiB; open files {files} -> {later[-1][2]}")
    raise SystemExit(growth > 0.01 or any(row[2] != files for row in later))


if __name__ == "__main__":
    main()
