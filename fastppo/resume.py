"""Going on where a run stopped: which checkpoint, whether the config still means the same, and everything put back."""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fastppo import checkpoint, distributed
from fastppo.checkpoint import Checkpoint
from fastppo.checks import require
from fastppo.config import RunConfig
from fastppo.run import Run
from fastppo.run_file import to_dict

LATEST = "latest"
PORTION_KEYS = {  # what a run that went out of memory may change: results then differ by rounding and random numbers
    "ppo.max_tokens_per_microbatch",
    "rollout.max_rows",
    "policy.gradient_checkpointing",
    "critic.gradient_checkpointing",
}
FREE_KEYS = {  # what else may differ between a run and its continuation
    *("out", "device", "train.eval_every", "train.eval_prompts_max", "train.save_every", "train.keep_last"),
    "train.loggers",
}


def find(config: RunConfig, resume: str) -> Checkpoint | None:
    """The checkpoint that `resume` names, or for "latest" the newest whole one of the run folder.

    Returns:
        None for "latest" in a folder that has none: the run starts from the beginning.

    Raises:
        ValueError: the checkpoint is damaged, or the config means another run.
    """
    if resume != LATEST:
        found, passed_over = checkpoint.read(Path(resume)), []
    else:
        found, passed_over = checkpoint.newest(Path(config.out, "checkpoints"))
    if distributed.rank() == 0:
        for reason in passed_over:
            print(f"resume: passed over: {reason}", flush=True)
        print(f"resume: {_described(found, config)}", flush=True)
    if found is not None:
        _refuse_another_run(found.numbers["config"], config)
    return found


def mark(run: Run, step: int) -> None:
    """Keep the small state as iteration `step` leaves it: a failure in the next one goes back to here."""
    rng = {"global": checkpoint.rng_state(), "engine": checkpoint.pack(run.engine.generator.get_state())}
    run.step = step
    run.boundary = {
        "step": step,
        "config": to_dict(run.config),
        "versions": _versions(),
        "engine": run.engine.state(),
        "prompts": {"position": run.prompts.position, "fingerprint": run.prompts.fingerprint},
        "rng": distributed.gather(rng),
    }


def restore(run: Run, found: Checkpoint) -> None:
    """Put back what `mark` kept and the tensors beside it.

    Raises:
        ValueError: the checkpoint is of another model, other prompts or another number of ranks.
    """
    numbers, world = found.numbers, distributed.world_size()
    prompts, rng = numbers["prompts"], numbers["rng"]
    require(
        prompts["fingerprint"] == run.prompts.fingerprint,
        f"checkpoint {found.path}: the prompts of {run.config.data.prompts!r} are not those the run began with",
    )
    require(len(rng) == world, f"checkpoint {found.path} is of {len(rng)} ranks, this run has {world}")
    run.engine.load(numbers["engine"], found.tensors())
    run.prompts.position = prompts["position"]
    mine = rng[distributed.rank()]
    run.engine.generator.set_state(checkpoint.unpack(mine["engine"]))
    checkpoint.set_rng_state(mine["global"])
    mark(run, found.step)
    if numbers["versions"] != _versions() and distributed.rank() == 0:
        print(f"resume: versions were {numbers['versions']}, now {_versions()}: not bit for bit", flush=True)


def _described(found: Checkpoint | None, config: RunConfig) -> str:
    if found is None:
        return f"no whole checkpoint in {Path(config.out, 'checkpoints')}: starting from the beginning"
    return f"going on after iteration {found.step} from {found.path}"


def _refuse_another_run(before: dict[str, Any], config: RunConfig) -> None:
    now, then = _flat(json.loads(json.dumps(to_dict(config)))), _flat(before)
    free = FREE_KEYS | PORTION_KEYS
    if config.policy_optimizer.schedule == config.critic_optimizer.schedule == "constant":
        free.add("train.total_steps")  # else it stretches the schedules
    differ = sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key))
    changed = [key for key in differ if key not in free]
    if distributed.rank() == 0 and not PORTION_KEYS.isdisjoint(differ):
        print(f"resume: {', '.join(sorted(PORTION_KEYS.intersection(differ)))} changed: not bit for bit", flush=True)
    shown = "; ".join(f"{key} was {then.get(key)!r}, is {now.get(key)!r}" for key in changed[:5])
    more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
    require(
        not changed,
        f"the checkpoint is of another run: {shown}{more}. Set them back, or start a new run in another `out`",
    )


def _flat(tables: Any, where: str = "") -> dict[str, Any]:
    """Dotted keys of nested tables and lists of tables."""
    if isinstance(tables, list) and tables and isinstance(tables[0], dict):
        tables = {str(i): table for i, table in enumerate(tables)}
    if not isinstance(tables, dict):
        return {where: tables}
    return {k: v for key, value in tables.items() for k, v in _flat(value, f"{where}.{key}".lstrip(".")).items()}


def _versions() -> dict[str, str]:
    names = ("fastppo", "torch", "transformers")
    return {name: version(name) for name in names} | {
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }
