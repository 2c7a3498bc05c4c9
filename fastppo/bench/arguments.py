"""The command line that every suite and every op has."""

from __future__ import annotations

import argparse
import json
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastppo.bench import harness, records
from fastppo.bench.machine import UNKNOWN, machine
from fastppo.bench.records import OURS, Record
from fastppo.checks import InputError, require
from fastppo_kernels.head import keep_freed_memory

SAME = ("device", "threads", "commit", "versions")  # of the machine: what a measurement belongs to


def parser(doc: str | None, *, repeats: int = 15) -> argparse.ArgumentParser:
    """The options that every op has."""
    made = argparse.ArgumentParser(
        prog="fastppo bench", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common(made)
    made.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"))
    made.add_argument("--entropy", type=boolean, nargs="+", default=[False, True], help="of the row losses")
    made.add_argument("--repeats", type=int, default=repeats, help="rounds per case, unless --seconds ends them first")
    made.add_argument(
        "--seconds", type=float, default=20.0, help=f"of rounds per case, after at least {harness.LEAST_ROUNDS}"
    )
    made.add_argument("--only", nargs="+", help="names of variants; fastppo always runs")
    return made


def add_common(made: argparse.ArgumentParser) -> None:
    """The options that every suite has."""
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--seed", type=int, default=0, help="of all random inputs")
    made.add_argument("--commit", help="what to call the commit; default: what git says")
    made.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs: times mean nothing")
    made.add_argument("--out", type=Path, help="append JSON lines here")
    made.add_argument("--go-on", action="store_true", help="leave out what --out has of this commit and machine")


def boolean(text: str) -> bool:
    """ "True" or "False"."""
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"True or False, not {text!r}")
    return text == "True"


def sizes(letters: str) -> Callable[[str], tuple[int, ...]]:
    """The type of an option like "1024,128,32000", with a number for each of `letters`, e.g. "R,H,V"."""

    def parse(text: str) -> tuple[int, ...]:
        found = tuple(int(number) for number in text.split(","))
        if len(found) != len(letters.split(",")):
            raise argparse.ArgumentTypeError(f"a shape is {letters}, got {text!r}")
        return found

    return parse


def start(made: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """The parsed options, with the number of threads and the seed set and the machine measured."""
    options = made.parse_args(argv)
    if options.device != "cpu" and not torch.cuda.is_available():
        made.error(f"--device {options.device}, but torch finds no GPU here")
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as where a model trains: else every result of a few MB is new pages
    machine(options.device, options.seed, options.commit)  # before there is anything else in memory
    torch.manual_seed(options.seed)  # after that, which draws: an op has the inputs that it has alone
    return options


def run(
    made: argparse.ArgumentParser,
    cases: Callable[[argparse.Namespace], Iterable[harness.Case]],
    argv: list[str] | None = None,
) -> None:
    """A whole op: every case of the options on the command line.

    Raises:
        ValueError: after all of them, if results of fastppo were wrong; a record says so.
    """
    options = start(made, argv)
    failures = []
    for case in cases(options):
        if is_there(harness.head(case), options):
            continue
        try:
            harness.measure(case, options)
        except Exception as error:  # the cases after it are measured
            failures += failed([harness.head(case) | {"variant": OURS}], error, options)
    refuse(failures)


def each(runs: Iterable[Callable[[], object]]) -> None:
    """One after the other, whatever becomes of those before.

    Raises:
        ValueError: after all of them, what any of them refused, or how it failed.
    """
    failures = []
    for run in runs:
        try:
            run()
        except InputError as error:
            failures.append(str(error))
        except Exception as error:  # a case could not even be made
            traceback.print_exception(error)
            failures.append(f"{type(error).__name__}: {error}")
    require(not failures, "\n".join(failures))


def failed(heads: Sequence[Record], error: Exception, options: argparse.Namespace) -> list[str]:
    """Keep and print why settings were not timed; what `refuse` is to say at the end."""
    traceback.print_exception(error)
    why = f"{type(error).__name__}: {error}"
    here = {"machine": machine(options.device, options.seed, options.commit)}
    records.append(options.out, [head | {"skipped": why} | here for head in heads])
    said = [f"{head['op']} {records.setting_text(head['setting'])}: {why}" for head in heads]
    print(*(f"\nNOT TIMED {line}" for line in said), sep="\n")
    return said


def refuse(failures: Sequence[str]) -> None:
    """
    Raises:
        ValueError: there are some.
    """
    require(not failures, "\n".join(["not timed:", *failures]))


def is_there(wanted: Record, options: argparse.Namespace) -> bool:
    """Whether --go-on was asked for and --out holds fastppo's time of this suite, op and setting.

    Of this commit, on this device, beside these versions: what another had is measured again.
    """
    here = machine(options.device, options.seed, options.commit)
    if not options.go_on or options.out is None or not options.out.exists() or here["commit"] == UNKNOWN:
        return False

    def key(line: Record, here: Record) -> list[Any]:
        return [line.get(x) for x in ("suite", "op", "setting")] + [here.get(x) for x in SAME]

    asked = json.loads(json.dumps(key(wanted, here)))
    found = (x for x in records.read(options.out) if x["variant"] == OURS and "skipped" not in x)
    return any(key(line, line.get("machine", {})) == asked for line in found)
