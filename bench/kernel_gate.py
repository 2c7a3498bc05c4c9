"""The gate of the Triton kernels: compiled for real GPUs on any machine, and held to budgets.

    python bench/kernel_gate.py                    # exit 1 if a budget is broken
    python bench/kernel_gate.py --targets sm_90    # one GPU only

Needs no GPU: Triton brings NVIDIA's assembler and disassembler and LLVM's AMDGPU backend. Nothing runs.
"""

import os
import sys

if os.environ.pop("TRITON_INTERPRET", ""):
    print("kernel gate: TRITON_INTERPRET is set; starting again without it, as the interpreter compiles nothing")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.argv])

import argparse
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import triton
from gate.entry import Entry, broken, entries
from gate.listing import Report, report
from gate.targets import TARGETS, Launch, Target, compiled, launches, programs_per_multiprocessor

COLUMNS = ("regs", "spill", "stack", "smem", "prog/SM", "narrow", "atom", "instr", "/elt", "budget")


class Line(NamedTuple):
    """One compiled kernel."""

    target: str
    name: str
    cells: tuple[str, ...]
    broken: list[str]


def lines(entry: Entry, target: Target) -> list[Line]:
    """Every kernel that `entry` launches, compiled for `target` and judged."""
    found = launches(entry.call, target)
    if not found:
        return [Line(target.name, entry.name, (), ["launches no kernel"])]
    return [_line(entry, target, launch, len(found) > 1) for launch in found]


def _line(entry: Entry, target: Target, launch: Launch, several: bool) -> Line:
    name = f"{entry.name} ({launch.arguments.get('PART', launch.kernel.__name__)})" if several else entry.name
    try:
        made = report(compiled(launch, target))
    except Exception as error:  # a kernel that does not compile is a verdict, and the other kernels still have theirs
        return Line(target.name, name, (), [f"does not compile: {type(error).__name__}: {str(error)[-300:]}"])
    elements = entry.elements(launch.arguments) if entry.elements else None
    merges = several and not made.loops  # the part of a split that puts together what the others counted
    bad = broken(made, entry.budget, target.name, None if merges else elements)
    threads = launch.options.get("num_warps", 4) * target.gpu.warp_size
    programs = programs_per_multiprocessor(target, threads, made.registers, made.shared)
    if programs < 1:
        bad.append(f"{made.registers} registers and {made.shared} bytes of shared memory do not fit a multiprocessor")
    return Line(target.name, name, _cells(made, entry, target, programs, elements), bad)


def _cells(made: Report, entry: Entry, target: Target, programs: int, elements: int | None) -> tuple[str, ...]:
    per_element = f"{made.hot_instructions / elements:.1f}" if elements and made.loops else "-"
    limit = entry.budget.per_element.get(target.name) if per_element != "-" else None
    narrow = sum(loop.narrow for loop in made.loops) if target.is_nvidia else "-"
    numbers = (made.registers, made.spills, made.stack, made.shared, programs, narrow, made.atomics, made.instructions)
    return (*map(str, numbers), per_element, f"{limit or '-'}")


def table(found: list[Line]) -> str:
    """Aligned text, a line per kernel, what is broken under it."""
    width = max(len(line.name) for line in found)
    rows = ["verdict  target  " + "kernel".ljust(width) + "".join(name.rjust(8) for name in COLUMNS)]
    for line in found:
        cells = "".join(cell.rjust(8) for cell in line.cells)
        rows.append(f"{'FAIL' if line.broken else 'ok':8} {line.target:7} {line.name:{width}}{cells}")
        rows += [f"         {'':7} ^ {reason}" for reason in line.broken]
    return "\n".join(rows)


def _job(index: int, target_name: str) -> list[Line]:
    warnings.simplefilter("ignore")
    target = next(target for target in TARGETS if target.name == target_name)
    return lines(entries()[index], target)


def main() -> int:
    """Compile everything, print the table, return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [target.name for target in TARGETS]
    parser.add_argument("--targets", nargs="+", choices=names, default=names)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    chosen = parser.parse_args()
    started = time.perf_counter()
    jobs = [(i, t) for t in chosen.targets for i, entry in enumerate(entries()) if t in entry.targets]
    with ProcessPoolExecutor(
        chosen.jobs, get_context("spawn")
    ) as pool:  # a fork would inherit locks of torch's threads
        found = [line for some in pool.map(_job, *zip(*jobs, strict=True)) for line in some]
    print(table(found))
    failures = sum(bool(line.broken) for line in found)
    seconds = time.perf_counter() - started
    print(f"triton {triton.__version__}: {failures} of {len(found)} kernels break their budget; {seconds:.0f} s")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
