"""The command line of `fastppo bench`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fastppo.bench import arguments, compare, end_to_end, pages, rollout, step
from fastppo.bench.ops import OPS
from fastppo.checks import InputError

USAGE = """fastppo bench SUITE [options] [--out NEW.jsonl] [--compare OLD.jsonl [--max-ratio 1.1]]
       fastppo bench compare OLD.jsonl NEW.jsonl [--max-ratio 1.1]
       fastppo bench report [RESULTS FOLDER] [--docs docs/benchmarks.md]"""
HELP = f"""usage: {USAGE}

Times fastppo on this machine, beside the projects that are installed and against the machine's own limits.

suites:
  kernels      every op beside its peers; --ops picks some; `fastppo bench kernels --ops gae --help`
  step         one PPO iteration by phase, on model shapes with random weights
  rollout      sampling beside transformers' generate and generate_batch
  end-to-end   one PPO iteration, and what it learns, beside TRL 1.12.0's PPOTrainer
  all          these four, one after the other

`fastppo bench SUITE --help` lists the options of a suite; --quick runs tiny shapes. Every measurement is a line of JSON
in --out; --compare prints what moved against an older file and ends with exit code 1 where fastppo became slower by
more than --max-ratio beyond the noise. `report` writes the page and the pictures from a folder of such files."""


def bench(argv: list[str]) -> int:
    """Run a suite or make something of results; the exit code: 1 if a comparison found a regression.

    Raises:
        ValueError: a suite that does not exist, or files that are no measurements.
    """
    if not argv or argv[0] in ("--help", "-h"):
        print(HELP)
        return 0
    name, rest = argv[0], argv[1:]
    if name == "compare":
        return _compare(rest)
    if name == "report":
        pages.main(rest)
        return 0
    if name not in ("all", *SUITES):
        raise InputError(f"no suite {name!r}: there are {', '.join(SUITES)}, all, compare, report")
    made = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    made.add_argument("--compare", type=Path)
    made.add_argument("--max-ratio", type=float, default=1.1)
    mine, rest = made.parse_known_args(rest)
    if mine.compare is None:
        _run(name, rest)
        return 0
    return _run_and_compare(name, rest, mine.compare, mine.max_ratio)


def _run(name: str, argv: list[str]) -> None:
    """One suite, or all of them with the options that all have; what fails in one does not stop the next."""
    if name == "all":
        common = argparse.ArgumentParser(prog="fastppo bench all", description=HELP, allow_abbrev=False)
        arguments.add_common(common)
        common.parse_args(argv)
    only = {"end-to-end": ["--device", "cpu"]} if name == "all" else {}
    chosen = SUITES if name == "all" else [name]
    arguments.each(partial(SUITES[suite], [*argv, *only.get(suite, [])]) for suite in chosen)


def _run_and_compare(name: str, argv: list[str], old: Path, max_ratio: float) -> int:
    """The new measurements go to --out, which must not hold others."""
    made = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    made.add_argument("--out", type=Path)
    new = made.parse_known_args(argv)[0].out
    if new is None or new.exists():
        got = "no --out" if new is None else f"{str(new)!r}, which exists"
        raise InputError(f"--compare needs --out with a new file for these measurements, got {got}")
    if not old.exists():
        raise InputError(f"cannot read the measurements at {str(old)!r}: there is no such file")
    try:
        _run(name, argv)
    finally:  # what was not timed is part of the comparison
        slower = compare.compare(old, new, max_ratio) if new.exists() else 0
    return int(slower > 0)


def _compare(argv: list[str]) -> int:
    made = argparse.ArgumentParser(prog="fastppo bench compare", description=compare.__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("old", type=Path)
    made.add_argument("new", type=Path)
    made.add_argument("--max-ratio", type=float, default=1.1, help="exit code 1 above it")
    options = made.parse_args(argv)
    return int(compare.compare(options.old, options.new, options.max_ratio) > 0)


def kernels(argv: list[str]) -> None:
    """The ops that --ops names, or all; other options go to each of them."""
    made = argparse.ArgumentParser(prog="fastppo bench kernels", add_help=False, allow_abbrev=False)
    made.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), help="default: all; each --help has its own")
    mine, rest = made.parse_known_args(argv)
    if {"-h", "--help"}.intersection(rest) and len(mine.ops) > 1:
        made.print_help()
        print("\nand, of every op:")
    arguments.each(partial(arguments.run, OPS[op].parser(), OPS[op].cases, rest) for op in mine.ops)


SUITES: dict[str, Callable[[list[str]], None]] = {
    "kernels": kernels,
    "step": step.main,
    "rollout": lambda argv: arguments.run(rollout.parser(), rollout.cases, argv),
    "end-to-end": end_to_end.main,
}
