"""The command line that every suite and every op has."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from fastppo.bench import harness, records
from fastppo.bench.records import Record
from fastppo_kernels.head import keep_freed_memory


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
    made.add_argument("--go-on", action="store_true", help="leave out what --out has already")


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
    """The parsed options, with the number of threads and the seed set."""
    options = made.parse_args(argv)
    if options.device != "cpu" and not torch.cuda.is_available():
        made.error(f"--device {options.device}, but torch finds no GPU here")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    keep_freed_memory()  # as where a model trains: else every result of a few MB is new pages
    return options


def run(
    made: argparse.ArgumentParser,
    cases: Callable[[argparse.Namespace], Iterable[harness.Case]],
    argv: list[str] | None = None,
) -> None:
    """A whole op: every case of the options on the command line."""
    options = start(made, argv)
    for case in cases(options):
        if not is_there(harness.head(case), options):
            harness.measure(case, options)


def is_there(wanted: Record, options: argparse.Namespace) -> bool:
    """Whether --go-on was asked for and --out holds records with the suite, op and setting of this one."""
    if not options.go_on or options.out is None or not options.out.exists():
        return False
    names = ("suite", "op", "setting")
    asked = [json.loads(json.dumps(wanted[name])) for name in names]
    return any([line.get(name) for name in names] == asked for line in records.read(options.out))
