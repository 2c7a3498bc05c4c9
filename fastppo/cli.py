"""The `fastppo` command: train, plan, demo, bench, doctor. The only file that knows the command-line library."""

import argparse
import functools
import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout

import transformers
import tyro

from fastppo import __version__, report
from fastppo import doctor as doctor_module
from fastppo.checks import InputError, RolloutError, require
from fastppo.config import RunConfig
from fastppo.demo import demo as run_demo
from fastppo.distributed import RankError
from fastppo.faults import NonFiniteError
from fastppo.flags import refuse_unknown
from fastppo.memory import report as memory_report
from fastppo.memory.start import plan_run
from fastppo.out_of_memory import OutOfMemory
from fastppo.resume import LATEST
from fastppo.rewards import RewardError
from fastppo.run_file import load_config
from fastppo.trainer import train as run_training
from fastppo.watch import DriftError

DESCRIPTION = "PPO for language models. `fastppo --version` prints the version."
RUN_ERRORS = (
    RewardError,
    RolloutError,
    NonFiniteError,
    DriftError,
    OutOfMemory,
    RankError,
    OSError,
)  # ends of a run that the message explains
START = {  # options that are not keys of the run
    "train": "--resume: go on from the newest whole checkpoint; --resume DIR: from that one. --profile: a trace of two "
    "iterations. All others are keys of the run:",
    "plan": "--gpu 24GB: plan for that card, not for this machine. --json: print JSON. All others are keys of the run:",
}
NO_KEYS = {"train": ("resume", "profile", "help"), "plan": ("gpu", "json", "help")}  # the names of those
NO_RUN_FILE = (
    "train needs a run file, before any option: fastppo train RUN.toml --ppo.kl-coef 0.1; "
    "README.md shows one, `fastppo train --help` says more"
)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Bad input ends with one line on stderr and exit code 2, what ends a run with exit code 1.

    Ctrl-C ends with 130, SIGTERM while a run trains with 0: the run is saved.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    transformers.utils.logging.disable_progress_bar()  # of loading and saving weights
    transformers.utils.logging.set_verbosity_error()  # what a checkpoint lacks is an error of our own, in one line
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as with `python -m fastppo`: where module:function is looked up
    try:
        if args == ["--version"]:
            print(f"fastppo {__version__}")
        elif args[:1] == ["train"] and args[1:2] not in (["--help"], ["-h"]):
            train_with(args[1:])
        elif args[:1] == ["plan"] and args[1:2] not in (["--help"], ["-h"]):
            plan_with(args[1:])
        elif args[:1] == ["bench"]:
            run_bench(args[1:])
        else:
            commands = {"train": train, "plan": plan, "demo": demo, "bench": bench, "doctor": doctor}
            tyro.extras.subcommand_cli_from_dict(commands, args=args, prog="fastppo", description=DESCRIPTION)
    except (InputError, *RUN_ERRORS) as error:
        print(f"fastppo: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, InputError) else 1) from error
    except KeyboardInterrupt as error:
        print("fastppo: interrupted", file=sys.stderr)
        raise SystemExit(130) from error


def train_with(args: Sequence[str]) -> None:
    """`fastppo train` with what comes after it."""
    require(len(args) > 0 and not args[0].startswith("-"), NO_RUN_FILE)
    resume, profile, overrides = parse_start(args[1:])
    folder = run_training(parse_run(args[0], overrides), resume=resume, profile=profile)
    if os.environ.get("RANK", "0") == "0":  # torchrun's; the process group is left by now
        report.summary(folder)


def plan_with(args: Sequence[str]) -> None:
    """`fastppo plan` with what comes after it; exit code 2 where the run does not fit."""
    require(len(args) > 0 and not args[0].startswith("-"), NO_RUN_FILE.replace("train", "plan"))
    parser = argparse.ArgumentParser(prog="fastppo plan RUN.toml", add_help=False, allow_abbrev=False)
    parser.add_argument("--gpu")
    parser.add_argument("--json", action="store_true")
    known, overrides = parser.parse_known_args(args[1:])
    made, ways = plan_run(parse_run(args[0], overrides, "plan"), known.gpu)
    if known.json:
        print(json.dumps(memory_report.to_dict(made, ways), indent=2))
    else:
        memory_report.show(made, ways)
    if not made.fits:
        raise SystemExit(2)


def parse_start(args: Sequence[str]) -> tuple[str | None, bool, list[str]]:
    """Take `--resume`, `--resume DIR` and `--profile` out of the overrides: about this start, not about the run."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", nargs="?", const=LATEST)
    parser.add_argument("--profile", action="store_true")
    known, overrides = parser.parse_known_args(args)
    return known.resume, known.profile, overrides


def parse_run(path: str, overrides: Sequence[str], command: str = "train") -> RunConfig:
    """A run file with `--dotted.key value` overrides, e.g. `--ppo.kl-coef 0.1 --rewards.0.weight 2`.

    A config that refuses its values is an `InputError`, as it is in the file, and so is an option that does not exist;
    tyro would draw a box around it.
    """
    prog, written = f"fastppo {command} {path}", load_config(path)
    parse = functools.partial(
        tyro.cli, RunConfig, default=written, args=list(overrides), prog=prog, description=START[command]
    )
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            config, unknown = parse(return_unknown_args=True)
    except SystemExit as ended:
        error: BaseException | None = ended
        while error is not None and not isinstance(error, InputError):
            error = error.__context__
        if error is not None:
            raise error from None
        return parse()  # the help, or what is wrong with the values
    refuse_unknown(unknown, config, NO_KEYS[command], command)
    return config


def train(run: tyro.conf.Positional[str]) -> None:
    """Run PPO as a TOML file says. Any key can be changed: `fastppo train RUN.toml --ppo.kl-coef 0.1`;
    `fastppo train RUN.toml --help` lists all of them. `--resume` goes on from the newest whole checkpoint of the run
    folder, `--resume DIR` from that one; `--profile` writes trace.json.gz and profile.txt of two iterations into it.

    Args:
        run: the run file.
    """
    train_with([run])


def plan(run: tyro.conf.Positional[str], gpu: str | None = None, json: bool = False) -> None:
    """Peak memory of each phase of a run, by component, from its models' config.json alone; nothing is loaded. Exit
    code 2 where it does not fit, with the cheapest keys to change. Any key of the run can be changed, as for `train`.

    Args:
        run: the run file.
        gpu: memory of the GPU to plan for, as in 24GB; without it, this machine.
        json: print JSON.
    """
    plan_with([run, *(["--gpu", gpu] if gpu is not None else []), *(["--json"] if json else [])])


def demo(out: str = "runs/demo", seed: int = 1) -> None:
    """Make data, train a policy and a reward model, run PPO with four models, print before and after. No download.

    Args:
        out: folder for everything the demo makes; summary.json is in it.
        seed: of data, models and sampling.
    """
    run_demo(out, seed=seed)


def bench(suite: tyro.conf.Positional[str]) -> None:
    """Time kernels, PPO steps and rollouts against this machine's limits and other projects; `fastppo bench --help`.

    Args:
        suite: kernels, step, rollout, end-to-end, all; or compare, report.
    """
    run_bench([suite])


def run_bench(args: list[str]) -> None:
    """`fastppo bench` with what comes after it."""
    from fastppo.bench.command import bench as command  # only here: other commands need none of it

    if code := command(args):
        raise SystemExit(code)


def doctor() -> None:
    """Print what is installed, which backend and which attention run here, and why."""
    doctor_module.doctor()
