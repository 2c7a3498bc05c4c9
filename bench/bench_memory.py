"""Peak memory on the CPU: plans against measurement, and what each part of fastppo saves in one optimizer step.

python bench/bench_memory.py plan          # every phase of some runs: planned, measured
python bench/bench_memory.py ablation      # one step's peak, from the eager padded baseline on
Both print a table and, with --out, append JSON lines.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from memory_ablation import steps
from memory_cases import CASES, config, measured, planned

MIB = 1 << 20


def plan_rows(only: list[str] | None) -> list[dict[str, Any]]:
    """One row for every phase of every case."""
    rows = []
    for case in CASES:
        if only and case.name not in only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            run = config(case, Path(folder))
            plan, used = planned(run), measured(run, case)
        for phase in plan.phases:
            peak = used[phase.name].peak - plan.in_host_memory  # on a CPU that is the same memory
            sizes = {"planned_mib": phase.total / MIB, "measured_mib": peak / MIB}
            rows.append({"case": case.name, "phase": phase.name, **sizes, "error": phase.total / peak - 1})
    return rows


def ablation_rows() -> list[dict[str, Any]]:
    """One row for every step of the ablation."""
    rows = [{"step": name, "peak_mib": peak / MIB, "resident_mib": held / MIB} for name, peak, held in steps()]
    return [{**row, "of_baseline": row["peak_mib"] / rows[0]["peak_mib"]} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("plan", "ablation"))
    parser.add_argument("--only", nargs="+", help="names of cases")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = plan_rows(options.only) if options.what == "plan" else ablation_rows()
    for row in rows:
        print("  ".join(f"{x:9.3f}" if isinstance(x, float) else f"{x:<32}" for x in row.values()))
    if options.out:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        with options.out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"bench": f"memory {options.what}", **row, **versions}) + "\n" for row in rows)


if __name__ == "__main__":
    main()
