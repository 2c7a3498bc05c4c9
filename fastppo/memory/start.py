"""The plan against the machine: `fastppo plan`, and at every start of a run."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from fastppo import distributed, models
from fastppo.checks import InputError, require
from fastppo.config import RunConfig
from fastppo.memory import report
from fastppo.memory.plan import CONTEXT, Plan, make_plan
from fastppo.memory.setting import parse_size, setting_of
from fastppo.memory.ways import Way, can_fit, ways_to_fit
from fastppo.offload.roles import require_gpu

CPU = torch.device("cpu")
CGROUP = Path("/sys/fs/cgroup/memory.max")  # of a container
MEMINFO = Path("/proc/meminfo")


def plan_run(config: RunConfig, gpu: str | None) -> tuple[Plan, list[Way]]:
    """The plan of a run as written, on a GPU of the size that is named or on this machine; where it does not fit, the
    ways to.

    Raises:
        ValueError: the config cannot be run there, whatever the memory.
    """
    if gpu is not None:
        device, budget = torch.device("cuda"), parse_size(gpu)
    else:
        device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
        budget = memory_of(device)
    check_device(config, device)
    setting = setting_of(config, device)
    if gpu is None and device.type == "cuda":
        setting = replace(setting, host_memory=memory_of(CPU))
    made = make_plan(setting, budget)
    return made, [] if made.fits else ways_to_fit(config, made)


def check_device(config: RunConfig, device: torch.device) -> None:
    """
    Raises:
        ValueError: something is to leave a GPU, and the device is none.
    """
    models.require_a_gpu(config.layers, device)
    require_gpu(config.offload, device)
    for role in ("policy_optimizer", "critic_optimizer"):
        require(
            getattr(config, role).kind != "adamw-cpu-offload" or device.type == "cuda",
            f"{role}.kind = 'adamw-cpu-offload' keeps in host memory what a GPU does not hold, and this run is on "
            f"{device.type!r}, whose memory that is: use 'adamw'",
        )


def check_start(
    config: RunConfig, device: torch.device, prompt_tokens: int, evaluation: tuple[int, int] = (0, 0)
) -> Plan:
    """Say what the run will take, and refuse what cannot run. `evaluation`: as for `setting_of`.

    A run that only fits in smaller portions than its config says starts: where memory runs out they are halved.

    Raises:
        ValueError: no portions fit.
    """
    world = distributed.world_size()
    setting = setting_of(config, device, prompt_tokens=prompt_tokens, world_size=world, evaluation=evaluation)
    if device.type == "cuda":
        setting = replace(setting, host_memory=memory_of(CPU), ranks=distributed.local_world_size())
    made = make_plan(setting, memory_of(device))
    _check_host(made)
    if not made.fits and not can_fit(setting, made.budget):
        raise InputError(refusal(made, ways_to_fit(config, made)))
    if distributed.rank() == 0:
        print(report.verdict(made) + _remark(made), flush=True)
    return made


def refusal(plan: Plan, ways: list[Way]) -> str:
    """The breakdown, and what would fit."""
    parts = "\n".join(f"  {name:24}{report.gib(size):>12}" for name, size in plan.peak.parts.most_common())
    said = "\n".join(f"  {i}. {report.flags(way)}  ({way.cost})" for i, way in enumerate(ways, 1))
    ways_out = f"What fits:\n{said}" if ways else f"{report.no_way()}."
    return f"{report.verdict(plan)}, not even one sequence at a time:\n{parts}\n{ways_out}"


def write(plan: Plan, folder: Path) -> None:
    """plan.json of a run folder."""
    (folder / "plan.json").write_text(json.dumps(report.to_dict(plan, []), indent=2) + "\n", encoding="utf-8")


def memory_of(device: torch.device) -> int | None:
    """Bytes that a process may take there; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    known = [_meminfo("MemTotal"), int(CGROUP.read_text()) if _limited() else None]
    return min((size for size in known if size is not None), default=None)


def _check_host(plan: Plan) -> None:
    """
    Raises:
        ValueError: what is to be in host memory is more than that.
    """
    setting = plan.setting
    sent = [f"offload.{key} = 'keep'" for key in setting.offload.chosen]
    roles = [("policy", setting.policy), ("critic", setting.critic)]
    there = [name for name, model in roles if model and model.optimizer.kind == "adamw-cpu-offload"]
    ways = [*sent, *(f"{name}_optimizer.kind = 'adamw'" for name in there)]
    ways += ["train.async_save = false"] * setting.copies_to_save
    require(
        plan.fits_host,
        f"this run holds {report.gib(plan.host_needed)} in host memory, {report.gib(plan.checkpoint_copy)} of it to "
        f"write checkpoints from, and there is {report.gib(setting.host_memory or 0)}: set some of {', '.join(ways)}",
    )


def _limited() -> bool:
    return CGROUP.is_file() and CGROUP.read_text().strip().isdigit()


def _meminfo(name: str) -> int | None:
    """Linux's own account."""
    lines = MEMINFO.read_text().splitlines() if MEMINFO.is_file() else []
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:")), None)


def _remark(plan: Plan) -> str:
    if not plan.fits:
        return ", so micro-batches or rows will be halved when it runs out; `fastppo plan` says which settings fit"
    device, needed = plan.setting.device, plan.needed
    if device.type == "cuda":  # where the context is there already
        free, needed = torch.cuda.mem_get_info(device)[0], needed - CONTEXT["cuda"]
    else:
        free = _meminfo("MemAvailable")
    if free is not None and needed > free:
        return f", but only {report.gib(free)} are free now"
    return ""
