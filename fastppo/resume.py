"""Going on where a run stopped: which checkpoint, whether the config still means the same, and everything put back."""

import json
import platform
import re
import uuid
from dataclasses import MISSING, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fastppo import checkpoint, distributed, kept_rollout
from fastppo.checkpoint import Checkpoint
from fastppo.checks import InputError, require
from fastppo.config import RunConfig
from fastppo.config_layers import LayersConfig
from fastppo.config_offload import OffloadConfig
from fastppo.config_watch import WatchConfig
from fastppo.run import Run
from fastppo.run_file import to_dict

LATEST = "latest"
PORTION_KEYS = {  # what a run that went out of memory may change: results then differ by rounding and random numbers
    "ppo.max_tokens_per_microbatch",
    "rollout.max_rows",
    "rollout.kv_gib",
    *(f"layers.{f.name}" for f in fields(LayersConfig)),
}
FREE_KEYS = {  # what else may differ between a run and its continuation
    *("out", "device", "train.eval_every", "train.eval_prompts_max", "train.save_every", "train.keep_last"),
    *("train.loggers", "train.keep_best", "train.async_save", "train.keep_rollouts", "deterministic"),
    *("rewards.timeout_s", "rewards.retries", "rewards.on_error", "ppo.max_skipped_steps", "ppo.on_max_skipped"),
    *(f"watch.{f.name}" for f in fields(WatchConfig)),
    *(f"offload.{f.name}" for f in fields(OffloadConfig)),
    *(f"rollout.vllm.{key}" for key in ("servers", "folder", "timeout_s", "retries", "wait_s", "sleep", "gpu_share")),
    *("rollout.gap_stop", "rollout.cuda_graphs", "rollout.keep_memory"),
}


def find(config: RunConfig, resume: str | None) -> Checkpoint | None:
    """The checkpoint that `resume` names, or for "latest" the newest whole one of the run folder.

    Changes nothing but what killed processes left half done; for one process, the first rank.

    Returns:
        None without `resume`, and for "latest" in a folder that has none: the run starts from the beginning.

    Raises:
        ValueError: the checkpoint is damaged, the config means another run, or the run folder holds another one.
    """
    folder = Path(config.out)
    if resume is None:
        require_unused(folder)
        return None
    checkpoint.repair(folder / "checkpoints")
    if resume != LATEST:
        found, passed_over = checkpoint.read(Path(resume)), []
    else:
        found, passed_over = checkpoint.newest(folder / "checkpoints")
    for reason in passed_over:
        print(f"resume: passed over: {reason}", flush=True)
    if resume != LATEST and folder.resolve() not in Path(resume).resolve().parents:
        require_unused(folder)
    elif (folder / "config.json").exists():
        refuse_another_run(_config_of(folder), config, f"{str(folder)!r}")
    if found is not None:
        differ = refuse_another_run(found.numbers["config"], config, f"the checkpoint {str(found.path)!r}")
        if portions := ", ".join(sorted(PORTION_KEYS.intersection(differ))):
            print(f"resume: {portions} changed: not bit for bit", flush=True)
    if found is not None and config.rollout.engine == "vllm":
        ahead = ", and the first rollout comes from the policy as it is" if config.rollout.one_step_off else ""
        print(f"resume: vLLM's batches differ in rounding{ahead}: not bit for bit", flush=True)
    print(f"resume: {_described(found, config)}", flush=True)
    return found


def require_unused(folder: Path) -> None:
    """A folder that holds a run is left alone; an empty metrics.jsonl is of one that failed at its start."""
    metrics = folder / "metrics.jsonl"
    used = (metrics.exists() and metrics.stat().st_size > 0) or any(folder.glob("checkpoints/*"))
    ways = "go on with --resume, give another `out`, or delete the folder"
    require(not used, f"{str(folder)!r} already holds a run (its metrics.jsonl or checkpoints): {ways}")


def mark(run: Run, step: int) -> None:
    """Keep the small state as iteration `step` leaves it: a failure in the next one goes back to here."""
    run.step, run.saved, run.kept = step, False, None
    run.boundary = {
        "step": step,
        "id": distributed.from_first(lambda: uuid.uuid4().hex),  # no other run of the same steps has it
        "config": to_dict(run.config),
        "versions": _versions(),
        "engine": run.engine.state(),
        "prompts": {"position": run.rollouts.position, "fingerprint": run.prompts.fingerprint},
        "rng": distributed.gather(kept_rollout.state_of_rank(run)),
        "watch": run.watch.state(),
        "best": run.best,
        "rolled_back_to": run.rolled_back_to,
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
    run.watch.load(numbers["watch"])
    has_best = (run.folder / "checkpoints" / "best").exists()  # it is set aside when it is of another future
    run.best, run.rolled_back_to = numbers["best"] if has_best else None, numbers["rolled_back_to"]
    kept_rollout.set_state_of_rank(run, rng[distributed.rank()])
    mark(run, found.step)
    assert run.boundary is not None
    run.boundary["id"], run.saved = numbers["id"], True
    run.kept = kept_rollout.find(run)
    if numbers["versions"] != _versions() and distributed.rank() == 0:
        print(f"resume: versions were {numbers['versions']}, now {_versions()}: not bit for bit", flush=True)


def _described(found: Checkpoint | None, config: RunConfig) -> str:
    if found is None:
        return f"no whole checkpoint in {Path(config.out, 'checkpoints')}: starting from the beginning"
    return f"going on after iteration {found.step} from {found.path}"


def _config_of(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{str(folder / 'config.json')!r} is damaged ({error}): delete it to resume") from error


def refuse_another_run(before: dict[str, Any], config: RunConfig, what: str) -> list[str]:
    """The keys in which `before`, the config of `what`, differs from `config`.

    Raises:
        ValueError: one of them changes results.
    """
    now, then = _flat(json.loads(json.dumps(to_dict(config)))), _flat(before)
    free = FREE_KEYS | PORTION_KEYS
    if config.policy_optimizer.schedule == config.critic_optimizer.schedule == "constant":
        free.add("train.total_steps")  # else it stretches the schedules
    new = {key for key in now.keys() - then.keys() if _is_default(config, key)}  # of a later version of fastppo
    differ = sorted(key for key in (now.keys() | then.keys()) - new if now.get(key) != then.get(key))
    changed = [key for key in differ if re.sub(r"^rewards\.\d+", "rewards", key) not in free]
    shown = "; ".join(f"{key} was {then.get(key)!r}, is {now.get(key)!r}" for key in changed[:5])
    more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
    if "train.total_steps" in changed:
        more += " (it stretches the learning rates' schedules: free where both are 'constant')"
    require(
        not changed,
        f"{what} is of another run: {shown}{more}. Set them back, or start a new run in another `out`",
    )
    return differ


def _flat(tables: Any, where: str = "") -> dict[str, Any]:
    """Dotted keys of nested tables and lists of tables."""
    if isinstance(tables, list) and tables and isinstance(tables[0], dict):
        tables = {str(i): table for i, table in enumerate(tables)}
    if not isinstance(tables, dict):
        return {where: tables}
    return {k: v for key, value in tables.items() for k, v in _flat(value, f"{where}.{key}".lstrip(".")).items()}


def _is_default(config: Any, key: str) -> bool:
    """Whether the dotted key of a config has the value it has when nobody gives it one."""
    *tables, name = key.split(".")
    for table in tables:
        config = config[int(table)] if isinstance(config, tuple) else getattr(config, table)
    default = next((f.default for f in fields(config) if f.name == name), MISSING)
    return default is not MISSING and default == getattr(config, name)


def _versions() -> dict[str, str]:
    names = ("fastppo", "torch", "transformers")
    gpus = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "none"
    return {name: version(name) for name in names} | {
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
        "cuda": gpus,
    }
