"""A plan as a table with bars, as one line, and as JSON."""

from typing import Any

from rich.console import Console
from rich.table import Table

from fastppo.memory.plan import GIB, Phase, Plan
from fastppo.memory.ways import Way, is_installed

BAR, BEYOND = 40, 10  # characters of a bar up to the budget, and at most past it
BESIDE = "process and allocator"
FILLS = "█▓▒░▚▞▤▥▦▧▨ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # more than there are components


def gib(size: float) -> str:
    """Bytes in GiB, or in MiB where that is less than one."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def show(plan: Plan, ways: list[Way]) -> None:
    """Print the table, the bars, the verdict and the ways to fit."""
    console = Console()
    console.print(_table(plan))
    for phase in plan.phases:
        console.print(f"{phase.name:>8} {_bar(phase, plan)}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"{'':>8} {_legend(plan)}", highlight=False, markup=False, soft_wrap=True)
    console.print(verdict(plan), highlight=False, markup=False, soft_wrap=True)
    for i, way in enumerate(ways, 1):
        needs = f"needs {gib(way.plan.needed)}"
        console.print(f"  {i}. {flags(way)}  ({needs}; {way.cost})", highlight=False, markup=False, soft_wrap=True)
    if not plan.fits and not ways:
        console.print(f"  {no_way()}", highlight=False, markup=False, soft_wrap=True)


def no_way() -> str:
    """What to say where none was found."""
    untried = "" if is_installed("peft") else "; adapters were not tried, they need pip install 'fastppo[lora]'"
    return f"no three changes of its keys make it fit: take a smaller model{untried}"


def flags(way: Way) -> str:
    """Its keys as `fastppo train` and `fastppo plan` take them on the command line."""
    return " ".join(_flag(key.replace("_", "-"), value) for key, value in way.keys.items())


def _flag(key: str, value: Any) -> str:
    group, _, name = key.rpartition(".")
    return {True: f"--{key}", False: f"--{group}.no-{name}"}[value] if isinstance(value, bool) else f"--{key} {value}"


def verdict(plan: Plan) -> str:
    """One sentence: how much, when, of what, and whether that fits."""
    most = ", ".join(f"{name} {gib(size)}" for name, size in plan.peak.parts.most_common(3))
    needs = f"memory: at most {gib(plan.needed)}, in the {plan.peak.name} phase ({most}; {BESIDE} {gib(plan.overhead)})"
    needs += f", and {gib(plan.in_host_memory)} wait in host memory" if plan.in_host_memory else ""
    if not plan.fits_host:
        return f"{needs}: does not fit, {gib(plan.host_needed)} with a copy for checkpoints are more than host memory"
    if plan.budget is None:
        return needs
    return f"{needs}: {'fits' if plan.fits else 'does not fit'} {gib(plan.budget)}"


def to_dict(plan: Plan, ways: list[Way]) -> dict[str, Any]:
    """For JSON; sizes are bytes."""
    work = plan.setting.work
    return {
        "fits": plan.fits,
        "budget": plan.budget,
        "needed": plan.needed,
        "beside_tensors": plan.overhead,
        "in_host_memory": plan.in_host_memory,
        "checkpoint_copy": plan.checkpoint_copy,
        "peak_phase": plan.peak.name,
        "phases": {phase.name: {"total": phase.total, **phase.parts} for phase in plan.phases},
        "microbatch_sequences": work.micro(work.minibatch)[0].sequences,
        "tokens_per_sequence": work.longest,
        "ways_to_fit": [{"keys": way.keys, "cost": way.cost, "needed": way.plan.needed} for way in ways],
    }


def _table(plan: Plan) -> Table:
    out = Table(title="peak memory, GiB")
    out.add_column("component")
    for phase in plan.phases:
        out.add_column(phase.name, justify="right")
    for name in _components(plan):
        out.add_row(name, *(_number(phase.parts[name]) for phase in plan.phases))
    out.add_section()
    out.add_row("sum", *(_number(phase.total) for phase in plan.phases))
    return out


def _components(plan: Plan) -> list[str]:
    return list(dict.fromkeys(name for phase in plan.phases for name in phase.parts))


def _number(size: int) -> str:
    return f"{size / GIB:.2f}" if size else ""


def _bar(phase: Phase, plan: Plan) -> str:
    """Its components one after the other, on a scale on which the budget, or else the peak, is `BAR` long."""
    scale = BAR / max(plan.budget or 0, 1 if plan.budget else plan.peak.total)
    drawn, done = "", 0.0
    for fill, name in zip(_fills(plan), _components(plan), strict=True):
        done += phase.parts[name] * scale
        drawn += fill * (round(done) - len(drawn))
    drawn = drawn if len(drawn) <= BAR + BEYOND else drawn[: BAR + BEYOND - 1] + "…"
    edge = drawn.ljust(BAR)
    return (edge if plan.budget is None else edge[:BAR] + "|" + edge[BAR:]) + f" {gib(phase.total)}"


def _legend(plan: Plan) -> str:
    return "  ".join(f"{fill} {name}" for fill, name in zip(_fills(plan), _components(plan), strict=True))


def _fills(plan: Plan) -> list[str]:
    return list(FILLS[: len(_components(plan))])
