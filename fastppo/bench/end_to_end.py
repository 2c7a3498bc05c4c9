"""One PPO iteration of fastppo against TRL's last PPOTrainer, and what both learn. `fastppo bench end-to-end`.

    fastppo bench end-to-end --trl-python peers/trl-ppo/bin/python --out FILE

Same models, prompts, lengths, epochs, optimizer and seeds: `ppo_iteration/ppo_setting.py`. Each run is a process of its
own, with huge pages for malloc; runs of the two alternate, so that a slow minute of the machine meets both. "speed"
times iterations after a warm-up; "reward" trains 20 iterations of a smaller setting, in which the reward moves, from
several sampling seeds, and compares the mean of the last 5. Both systems draw from generators of their own, so rewards
agree within the spread over seeds, not exactly.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastppo.bench import arguments, records, work
from fastppo.bench.machine import machine
from fastppo.bench.ppo_iteration.ppo_setting import SETTINGS, PPOSetting, build_policy
from fastppo.bench.records import OURS, Record
from fastppo.checks import require

HERE = Path(__file__).parent / "ppo_iteration"
TRL = "TRL 1.12.0 PPOTrainer"
SCRIPTS = {OURS: "run_fastppo.py", TRL: "run_trl.py"}
ELSEWHERE = {
    "verl 0.9.1": "a run is a Ray cluster with vLLM or SGLang workers: nothing for a CPU",
    "OpenRLHF 0.11.2": "requires flash-attn, DeepSpeed and Ray: nothing for a CPU",
    "AgileRL 2.58.0": "trains LoRA adapters; here all weights are trained",
}
ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # of both systems, unless it is set: docs/benchmarking.md
LAST = 5  # iterations that the final reward is the mean of


class PeerFailed(Exception):
    """The run of a peer ended with an error; its last line is the message."""


def output(python: str, script: str, *options: str) -> list[str]:
    """The lines that one script prints."""
    command, env = [python, str(HERE / script), *options], ENVIRONMENT | os.environ
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    except OSError as error:
        raise PeerFailed(f"cannot start {python!r}: {error.strerror}") from error
    if done.returncode:
        raise PeerFailed((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200])
    return done.stdout.splitlines()


def run(python: str, script: str, *options: str) -> dict[str, Any]:
    """The JSON line of one script."""
    return json.loads(output(python, script, *options)[-1])


def absent(trl_python: str | None) -> Record:
    """Why a peer cannot run, by name, from its imports alone: said before anything is timed.

    Raises:
        ValueError: the interpreter was asked for.
    """
    try:
        output(trl_python or sys.executable, SCRIPTS[TRL], "--help")
    except PeerFailed as error:
        require(trl_python is None, f"--trl-python: {TRL} cannot run with {trl_python!r}: {error}")
        print(f"{TRL} cannot run here ({error}): only fastppo is timed. --trl-python names an interpreter that has it")
        return {TRL: str(error)}
    return {}


def in_turn(
    options: argparse.Namespace, runs: list[list[str]], missing: Record
) -> tuple[dict[str, list[dict[str, Any]]], Record]:
    """Every system's rows, a run of each after the other for each of `runs`; and why a peer has none.

    Raises:
        PeerFailed: fastppo's own run.
    """
    pythons = {OURS: sys.executable, TRL: options.trl_python or sys.executable}
    common = ["--threads", str(options.threads)]
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in SCRIPTS}
    why = dict(missing)
    for round_, more in enumerate(runs):
        for name, script in SCRIPTS.items():
            if name in why:
                continue
            try:
                row = run(pythons[name], script, *more, *common)
            except PeerFailed as error:
                if name == OURS:
                    raise
                why[name] = str(error)
                continue
            rows[name].append(row)
            print(f"  run {round_ + 1} of {len(runs)}  {name:24}{row['median_seconds']:8.3f} s", flush=True)
    return rows, why


def speed(options: argparse.Namespace, missing: Record) -> list[Record]:
    """Seconds of an iteration, all runs together, and the peak memory above the imports' own."""
    print("\nspeed")
    name = "quick" if options.quick else "speed"
    rows, why = in_turn(
        options, [["--setting", name, "--iterations", str(options.iterations)]] * options.rounds, missing
    )
    setting = replace(SETTINGS[name], threads=options.threads)
    made = []
    for name in (name for name in SCRIPTS if name not in why):
        seconds = [s for row in rows[name] for s in row["seconds_per_iteration"][1:]]
        ratios = [a["median_seconds"] / b["median_seconds"] for a, b in zip(rows[name], rows[OURS], strict=True)]
        made.append(
            head("ppo_iteration", name, setting)
            | records.numbers(seconds, least_work(setting), "cpu")
            | {
                "times_fastppo": records.short(statistics.median(ratios)),
                "peak_extra_mb": statistics.median(row["peak_rss_above_imports_mb"] for row in rows[name]),
                "medians_ms": [records.short(1e3 * row["median_seconds"]) for row in rows[name]],
                "peer_versions": rows[name][0]["versions"],
                "note": " ".join(f"{key}={os.environ.get(key, value)}" for key, value in ENVIRONMENT.items()),
            }
        )
    return made + [head("ppo_iteration", n, setting) | {"skipped": x} for n, x in {**why, **ELSEWHERE}.items()]


def reward(options: argparse.Namespace, missing: Record) -> list[Record]:
    """The mean reward at the end of training, over sampling seeds: the same problem has the same answer."""
    print(f"\nreward after {options.reward_iterations} iterations, {options.seeds} sampling seeds")
    name = "quick" if options.quick else "learning"
    common = ["--setting", name, "--iterations", str(options.reward_iterations)]
    rows, why = in_turn(options, [[*common, "--sampling-seed", str(100 + i)] for i in range(options.seeds)], missing)
    setting = replace(SETTINGS[name], threads=options.threads)
    ends = {name: [statistics.fmean(row["rewards"][-LAST:]) for row in found] for name, found in rows.items()}
    made = []
    for name in (name for name in SCRIPTS if name not in why):
        made.append(
            head("ppo_reward", name, setting)
            | {
                "reward_first": records.short(statistics.fmean(row["rewards"][0] for row in rows[name])),
                "reward_last": records.short(statistics.fmean(ends[name])),
                "reward_sd": records.short(_sd(ends[name])),
                "difference": records.short(statistics.fmean(ends[name]) - statistics.fmean(ends[OURS])),
                "noise": records.short(2 * ((_sd(ends[name]) ** 2 + _sd(ends[OURS]) ** 2) / options.seeds) ** 0.5),
                "rewards": [row["rewards"] for row in rows[name]],
                "peer_versions": rows[name][0]["versions"],
            }
        )
    return made + [head("ppo_reward", name, setting) | {"skipped": x} for name, x in why.items()]


def _sd(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def head(op: str, variant: str, setting: PPOSetting) -> Record:
    names = ("prompts", "prompt_tokens", "response_tokens", "ppo_epochs", "minibatches", "threads", "learning_rate")
    shape = {"hidden": setting.hidden_size, "layers": setting.layers, "vocab_size": setting.vocab_size}
    numbers = {name: getattr(setting, name) for name in names}
    return {"suite": "end-to-end", "op": op, "setting": shape | numbers, "variant": variant}


def least_work(setting: PPOSetting) -> work.Work:
    """Of the whole iteration, as `fastppo bench step` counts it; the optimizer's bytes are 7 float32 per weight."""
    policy = build_policy(setting)
    sizes = work.Sizes.of(policy)
    batch = work.Batch([setting.prompt_tokens] * setting.prompts, [setting.response_tokens] * setting.prompts)
    state = 28.0 * (2 * sizes.body + sizes.head)
    options: dict[str, Any] = {"epochs": setting.ppo_epochs, "minibatches": setting.minibatches, "state_bytes": state}
    parts = work.phases(sizes, batch, torch.float32, rows=setting.prompts, **options)
    needed = (parts[name] for name in ("rollout", "reward", "reference", "values", "advantages", "update"))
    return work.together(needed, batch.tokens)


def show(lines: list[Record]) -> None:
    speeds = [line for line in lines if line["op"] == "ppo_iteration"]
    if speeds:
        records.show("one PPO iteration", speeds)
    for line in (line for line in lines if line["op"] == "ppo_reward" and "skipped" not in line):
        print(
            f"  {line['variant']:24} reward {line['reward_first']:.4f} -> {line['reward_last']:.4f} +- "
            f"{line['reward_sd']:.4f}; off fastppo's by {line['difference']:.4f}, noise {line['noise']:.4f}"
        )


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="fastppo bench end-to-end", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_common(made)
    made.set_defaults(device="cpu")  # both systems are set up for one here
    made.add_argument("--trl-python", help="an interpreter that has trl 1.12.0; default: this one")
    made.add_argument("--parts", nargs="+", choices=("speed", "reward"), default=["speed", "reward"])
    made.add_argument("--rounds", type=int, default=3, help="runs of each system")
    made.add_argument("--iterations", type=int, default=6, help="PPO iterations per run; the first is a warm-up")
    made.add_argument("--seeds", type=int, default=5, help="runs of each system for the reward")
    made.add_argument("--reward-iterations", type=int, default=20)
    return made


def main(argv: list[str] | None = None) -> None:
    options = arguments.start(parser(), argv)
    require(options.device == "cpu", f"end-to-end sets both systems up for a CPU, got --device {options.device}")
    if options.quick:
        options.rounds, options.iterations, options.seeds, options.reward_iterations = 1, 3, 1, 3
    parts = {"speed": speed, "reward": reward}
    missing = absent(options.trl_python)
    here = machine("cpu", options.seed, options.commit)  # measured before other processes run
    lines = [line for part in options.parts for line in parts[part](options, missing)]
    show(lines)
    records.append(options.out, [line | {"machine": here} for line in lines])
