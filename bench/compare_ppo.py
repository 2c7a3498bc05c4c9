"""One PPO iteration of fastppo against TRL's last PPOTrainer: runs both in turn and prints the ratio of the medians.

    make bench        # installs TRL 1.12.0 beside fastppo and runs this
    python bench/compare_ppo.py --out bench/results/ppo_iteration_cpu.jsonl

Each run is a process of its own; runs of the two alternate, so that a slow minute of the machine hits both.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def run(python: str, script: str, iterations: int) -> dict[str, Any]:
    """The JSON line of one script."""
    command = [python, str(HERE / script), "--iterations", str(iterations)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict[str, str]:
    """What the numbers belong to."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout
    return {
        "cpu": f"{len(names)} x {names[0]}" if names else platform.processor(),
        "system": platform.platform(),
        "commit": commit.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", default=sys.executable, help="a Python that has trl 1.12.0")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=6, help="PPO iterations per run; the first is a warm-up")
    parser.add_argument("--out", type=Path, help="append the JSON lines here")
    arguments = parser.parse_args()
    scripts = {"fastppo": (sys.executable, "bench_fastppo.py"), "trl": (arguments.trl_python, "bench_trl_ppo.py")}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in scripts}
    for round_ in range(arguments.rounds):
        for name, (python, script) in scripts.items():
            row = {**run(python, script, arguments.iterations), "round": round_, "machine": machine()}
            rows[name].append(row)
            print(f"{name:8} {row['median_seconds']:.3f} s  {row['peak_rss_above_imports_mb']:.0f} MB", flush=True)
            if arguments.out:
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    for key, unit in (("median_seconds", "s"), ("peak_rss_above_imports_mb", "MB above imports")):
        ours, theirs = (statistics.median(row[key] for row in rows[name]) for name in ("fastppo", "trl"))
        print(f"fastppo {ours:.2f} {unit}, TRL {theirs:.2f} {unit}: {theirs / ours:.2f}x")


if __name__ == "__main__":
    main()
