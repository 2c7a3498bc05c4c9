"""Peak memory: plans against measurement, and what each part of fastppo saves in one optimizer step.

python bench/bench_memory.py plan          # every phase of some runs: planned, measured
python bench/bench_memory.py verdict       # the same runs on a little more and a little less memory: fits or not
python bench/bench_memory.py ablation      # one step's peak on the CPU, from the eager padded baseline on
All print a table and, with --out, append JSON lines; --device cuda goes by the GPU's allocator. A wrong verdict: exit
status 1.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from memory_ablation import steps
from memory_cases import CASES, UNEVEN, Case, config, peaks, planned

from fastppo.memory.plan import Plan, make_plan

MIB = 1 << 20
ALL = (*CASES, *UNEVEN)
Rows = Iterator[dict[str, Any]]
MARGIN = 0.07  # of the measured peak, by which a budget is above or below it
JUDGED = (
    *("full", "full, vocabulary 20000", "full, checkpointing", "full, bfloat16, one micro-batch"),
    *("lora", "full, 8-bit", "full, evaluation of 64 prompts", "full, four minibatches, roll-back"),
)


def plan_rows(cases: list[Case], device: str) -> Rows:
    """One row for every phase of every case."""
    for case in cases:
        plan, used = compared(case, device)
        for phase in plan.phases:
            sizes = {"planned_mib": phase.total / MIB, "measured_mib": used[phase.name] / MIB}
            yield {"case": case.name, "phase": phase.name, **sizes, "error": phase.total / used[phase.name] - 1}


def verdict_rows(cases: list[Case], device: str) -> Rows:
    """Two rows for every case. Budgets are of the tensors: what a plan assumes beside them is added to both sides."""
    for case in cases:
        plan, used = compared(case, device)
        peak = max(used.values())
        for factor in (1 + MARGIN, 1 - MARGIN):
            made = make_plan(plan.setting, plan.overhead + round(factor * peak))
            sizes = {"budget": factor * peak, "measured": peak, "planned": plan.peak.total}
            row = {"case": case.name, **{f"{name}_mib": size / MIB for name, size in sizes.items()}}
            right = made.fits == (factor > 1)
            yield {**row, "verdict": "fits" if made.fits else "refused", "right": "yes" if right else "NO"}


def compared(case: Case, device: str) -> tuple[Plan, dict[str, int]]:
    """The plan of a case, from config.json alone, and the bytes that were allocated."""
    with tempfile.TemporaryDirectory() as folder:
        run = config(case, Path(folder))
        plan, used = planned(run, device), peaks(run, case, device)
    waiting = plan.in_host_memory if device == "cpu" else 0  # on a CPU that is the same memory
    return plan, {name: peak - waiting for name, peak in used.items()}


def ablation_rows(cases: list[Case], device: str) -> Rows:
    """One row for every step of the ablation."""
    baseline = 0.0
    for name, peak, held in steps():
        baseline = baseline or peak / MIB
        yield {
            **{"step": name, "peak_mib": peak / MIB, "resident_mib": held / MIB},
            "of_baseline": peak / MIB / baseline,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("plan", "verdict", "ablation"))
    parser.add_argument("--only", nargs="+", choices=[case.name for case in ALL], metavar="CASE", help="their names")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.only or (JUDGED if options.what == "verdict" else [case.name for case in ALL])
    cases = [case for case in ALL if case.name in names and (options.device == "cpu" or case.fused != "native")]
    made = {"plan": plan_rows, "verdict": verdict_rows, "ablation": ablation_rows}
    rows = []
    for row in made[options.what](cases, options.device):
        print("  ".join(f"{x:9.3f}" if isinstance(x, float) else f"{x:<32}" for x in row.values()), flush=True)
        rows.append(row)
    if options.out:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        with options.out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"bench": f"memory {options.what}", **row, **versions}) + "\n" for row in rows)
    if options.what == "verdict":
        right = sum(row["right"] == "yes" for row in rows)
        print(f"{right} of {len(rows)} verdicts are right")
        raise SystemExit(right < len(rows))


if __name__ == "__main__":
    main()
