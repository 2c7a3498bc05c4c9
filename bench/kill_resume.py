"""A small run on the CPU is killed with SIGKILL again and again, and resumed: it must end as if nothing had happened.

    python bench/kill_resume.py --kills 20

Every life of the run is killed inside a phase chosen in turn (rollout, reward, score, update, checkpoint write), at a
random moment of it; the next one is started with --resume. At the end all weights, optimizer moments and logged numbers
are compared, bit for bit, with a run that nobody disturbed. Exit code 1 if one differs.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))
PHASES = ("rollout", "reward", "score", "update", "write")


def child(path: str) -> None:
    """`fastppo train PATH --resume` that says on stdout which phase begins."""
    from fastppo import checkpoint, cli, trainer
    from fastppo.metrics import PhaseTimer

    def say(phase: str) -> None:
        os.write(1, f"phase {phase}\n".encode())

    write = checkpoint.write

    def announced(*args: Any) -> None:
        say("write")
        write(*args)
        say("written")

    checkpoint.write = announced

    def timer(announce: Any, *rest: Any) -> PhaseTimer:
        return PhaseTimer(lambda phase: (announce(phase), say(phase))[0], *rest)

    trainer.PhaseTimer = timer  # pyright: ignore
    cli.main(["train", path, "--resume"])


def start(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__)), "--child", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    return subprocess.Popen(
        command, cwd=ROOT / "tests", env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def life(path: Path, phase: str | None, rng: random.Random, longest_s: float = 0.0) -> dict[str, Any]:
    """One life of the run; killed in the n-th occurrence of `phase`, at most `longest_s` after it began, or left alone
    with None."""
    process, left, seen, lines, events = start(path), rng.randint(1, 6), "start", [], []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if line.startswith("phase "):
            seen = line.split()[1]
            events.append((seen, time.perf_counter()))
            left -= seen == phase
            if seen == phase and left == 0:
                time.sleep(rng.random() * longest_s)
                process.send_signal(signal.SIGKILL)
                break
    rest, _ = process.communicate(timeout=120)
    late = [x.split()[1] for x in rest.splitlines() if x.startswith("phase ")]
    resumed = [x for x in lines if x.startswith("resume: going on after iteration")]
    return {
        "code": process.returncode,
        "phase": [seen, *late][-1],
        "events": events,
        "resumed": resumed[0].split()[5] if resumed else "0",
        "took": next((x.split(" of ")[0].split("took the ")[1] for x in lines if x.startswith("resume: took")), "-"),
        "output": "".join(lines) + rest,
    }


def longest(events: list[tuple[str, float]]) -> dict[str, float]:
    """Seconds within which nine of ten of each phase end: until another begins, of a write until it is written."""
    spans: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for i, (phase, begin) in enumerate(events):
        aside = ("write", "written")
        ends = [t for name, t in events[i + 1 :] if (name == "written" if phase == "write" else name not in aside)]
        if phase in spans and ends:
            spans[phase].append(ends[0] - begin)
    return {phase: sorted(found)[len(found) * 9 // 10] for phase, found in spans.items()}


def make_run(folder: Path, name: str, steps: int) -> Path:
    import transformers

    import runs

    transformers.utils.logging.disable_progress_bar()
    tables = runs.settings(
        folder,
        rewards=[{"kind": "function", "target": "runs:noisy"}],
        ppo={"num_epochs": 2, "num_minibatches": 2, "kl_coef": 0.1, "kl_target": 0.5, "normalize_scores": True},
        train={"total_steps": steps, "eval_every": 3, "save_every": 2, "keep_best": True},
        deterministic=True,
        out=str(folder / name),
    )
    path = folder / f"{name}.toml"
    path.write_text(runs.toml(tables), encoding="utf-8")
    return path


def differences(a: Path, b: Path) -> list[str]:
    """What is not the same, bit for bit, in two finished runs; times aside."""
    import torch
    from safetensors.torch import load_file

    final = [load_file(folder / "checkpoints" / "final" / "state.safetensors") for folder in (a, b)]
    wrong = [name for name in final[0] if not torch.equal(final[0][name], final[1].get(name, torch.zeros(0)))]
    wrong += [f"only in one: {name}" for name in final[0].keys() ^ final[1].keys()]
    rows = [(folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines() for folder in (a, b)]
    logged = [[{k: v for k, v in json.loads(row).items() if not k.startswith(("time/", "perf/"))} for row in x]
              for x in rows]  # fmt: skip
    wrong += [] if logged[0] == logged[1] else ["metrics.jsonl"]
    same = (a / "samples.jsonl").read_bytes() == (b / "samples.jsonl").read_bytes()
    return wrong + ([] if same else ["samples.jsonl"])


def measure(folder: Path, kills: int, seed: int) -> list[str]:
    """Kill, resume, compare; prints a line per kill and returns what differs."""
    rng, steps = random.Random(seed), max(8, 6 * kills)
    undisturbed = life(make_run(folder, "undisturbed", steps), None, rng)
    assert undisturbed["code"] == 0, undisturbed["output"]
    path, done, spans = make_run(folder, "killed", steps), 0, longest(undisturbed["events"])
    print("seconds of a phase:", {phase: round(span, 3) for phase, span in spans.items()})
    print(f"{'kill':>4}  {'aimed at':9} {'died in':9} {'had resumed from':>16}  and taken")
    while done < kills:
        phase = PHASES[done % len(PHASES)]
        ended = life(path, phase, rng, spans[phase])
        assert ended["code"] == -signal.SIGKILL, f"the run ended before kill {done + 1}:\n{ended['output']}"
        done += 1
        print(f"{done:4}  {phase:9} {ended['phase']:9} {ended['resumed']:>16}  {ended['took']}", flush=True)
    last = life(path, None, rng)
    assert last["code"] == 0, last["output"]
    return differences(folder / "undisturbed", folder / "killed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child)
    with tempfile.TemporaryDirectory() as folder:
        wrong = measure(Path(folder), args.kills, args.seed)
    print("different:" if wrong else "weights, moments, metrics and samples are the same, bit for bit", *wrong)
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
