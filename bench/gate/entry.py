"""What the gate compiles, and how much each may cost."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gate.listing import Report

SERVERS = ("sm_80", "sm_90", "sm_100", "gfx942")
EVERYWHERE = (*SERVERS, "sm_86", "sm_89", "sm_120")
"""With the GPUs of one person, whose programs have less shared memory and fewer threads."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits that a compiled kernel must keep on every target; those on loops where the listing is SASS."""

    registers: int = 256
    spills: int = 0
    """Instructions that save or fetch a register that did not fit; on AMD, vector registers saved to memory."""
    atomics: int = 0
    """Sums in the order of arrival are not repeatable."""
    narrow: int = 0
    """Loads and stores in hot loops that are not 16 bytes wide."""
    per_element: Mapping[str, float] = field(default_factory=dict)
    """Instructions per element over all hot loops, by target."""
    barrier_before_stores: bool = False
    """Stores lie over what other threads load."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A call of a public function on CPU tensors: every kernel that it launches is compiled."""

    name: str
    call: Callable[[], object]
    budget: Budget = Budget()
    elements: Callable[[dict[str, Any]], int] | None = None
    """Elements that a thread takes per turn of a hot loop, from the kernel's arguments."""
    targets: tuple[str, ...] = SERVERS


def entries() -> list[Entry]:
    """The ENTRIES of every module in `gate.entries`, in the order of the modules' names."""
    package = importlib.import_module("gate.entries")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [entry for name in names for entry in importlib.import_module(f"gate.entries.{name}").ENTRIES]


def broken(report: Report, budget: Budget, target: str, elements: int | None) -> list[str]:
    """The limits of `budget` that `report` breaks, in words."""
    found = [
        f"{name} {number} > {limit}"
        for name, number, limit in (
            ("registers", report.registers, budget.registers),
            ("spills", report.spills, budget.spills),
            ("atomics", report.atomics, budget.atomics),
            ("loads or stores in hot loops not 16 bytes wide", sum(x.narrow for x in report.loops), budget.narrow),
        )
        if number > limit
    ]
    if elements is not None and target in budget.per_element:
        cost, limit = report.hot_instructions / elements, budget.per_element[target]
        if not report.loops:
            found.append("no hot loop found to count instructions in")
        elif cost > limit:
            found.append(f"{cost:.1f} instructions per element > {limit:g}")
    if budget.barrier_before_stores and not report.stores_in_order:
        found.append("stores over what is still read: other threads may not have their loads yet")
    return found
