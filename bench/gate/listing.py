"""Reads assembler listings: registers, spills, widths of loads and stores, atomics, and the hot loops."""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LABEL = re.compile(r"^(\.L_x_\d+|\.LBB\d+_\d+):")
TARGET = re.compile(r"\.L_x_\d+|\.LBB\d+_\d+")
BRANCH, END = re.compile(r"BRA\b|s_c?branch"), re.compile(r"EXIT|s_endpgm")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")
LOAD, STORE = re.compile(r"(LDG|LDGSTS)\b"), re.compile(r"STG\b")
SPILL = re.compile(r"(LDL|STL)\b")
ATOMIC = re.compile(r"(ATOM|ATOMG|ATOMS|RED)\b")
AMD_INSTRUCTION = re.compile(r"^\t([a-z_][a-z0-9_]+)\b(?!:)(.*)")
AMD_ACCESS = re.compile(r"(global|buffer|flat)_")
AMD_LOAD, AMD_STORE = re.compile(r"(global|buffer)_load_dwordx4"), re.compile(r"(global|buffer)_store_dwordx4")
Code = list[tuple[str, str, str | None]]
"""(opcode, operands, label ahead of it or None) of each instruction."""


@dataclass(frozen=True)
class Loop:
    """An innermost loop that reads global memory: its opcodes in order."""

    opcodes: list[str]

    @property
    def narrow(self) -> int:
        """Loads and stores of global memory that are not 16 bytes wide."""
        return sum(bool(LOAD.match(op) or STORE.match(op)) and "128" not in op for op in self.opcodes)

    @property
    def spills(self) -> int:
        """Loads and stores of registers that did not fit."""
        return sum(bool(SPILL.match(op)) for op in self.opcodes)

    @property
    def has_stores(self) -> bool:
        """Whether it writes global memory."""
        return any(STORE.match(op) for op in self.opcodes)

    @property
    def barrier_before_stores(self) -> bool:
        """Whether every load is followed by a barrier ahead of the first store."""
        first = next(i for i, op in enumerate(self.opcodes) if STORE.match(op))
        loads = [i for i, op in enumerate(self.opcodes) if LOAD.match(op)]
        barriers = [i for i, op in enumerate(self.opcodes[:first]) if op.startswith("BAR")]
        return bool(barriers) and max(loads) < max(barriers)


@dataclass(frozen=True)
class Report:
    """What one compiled kernel needs; `loops` only where the listing is SASS."""

    registers: int
    stack: int
    shared: int
    spills: int
    atomics: int
    instructions: int
    loops: list[Loop] = field(default_factory=list)
    stores_in_order: bool = True
    """Whether what other threads store over has been read; see `stores_wait` and `Loop.barrier_before_stores`."""

    @property
    def hot_instructions(self) -> int:
        """Of one turn of every hot loop."""
        return sum(len(loop.opcodes) for loop in self.loops)


def read_sass(text: str) -> Code:
    """The instructions of an nvdisasm listing."""
    return _read(text, INSTRUCTION)


def read_amd(text: str) -> Code:
    """The instructions of AMD assembly."""
    return _read(text, AMD_INSTRUCTION)


def _read(text: str, instruction: re.Pattern[str]) -> Code:
    found, label = [], None
    for line in text.splitlines():
        if match := LABEL.match(line):
            label = match[1]
        elif match := instruction.match(line):
            found.append((match[1], match[2], label))
            label = None
    return found


def innermost(code: Code) -> list[tuple[int, int]]:
    """(first, last) instruction of the innermost loops of a listing.

    A jump backwards closes a loop, unless the program ends in between: then it leaves code placed out of line.
    """
    places = {label: i for i, (_, _, label) in enumerate(code) if label}
    spans = []
    for i, (op, operands, _) in enumerate(code):
        match = TARGET.search(operands) if BRANCH.match(op) else None
        start = places.get(match[0], i) if match else i
        if start < i and not any(END.match(other) for other, _, _ in code[start:i]):
            spans.append((start, i))
    return [(a, b) for a, b in spans if not any((c, d) != (a, b) and a <= c and d <= b for c, d in spans)]


def hot_loops(code: Code) -> list[Loop]:
    """Innermost loops of a listing that load from global memory."""
    loops = [Loop([op for op, _, _ in code[a : b + 1]]) for a, b in innermost(code)]
    return [loop for loop in loops if any(LOAD.match(op) for op in loop.opcodes)]


def stores_wait(code: Code) -> bool:
    """Whether AMD code waits for its 16-byte loads, then for the other threads, and only then stores 16 bytes.

    `s_barrier` does not say that loads have arrived, `s_waitcnt vmcnt(n)` does: that all but the last n have, which
    come in order. A loop loads for the turn after; its first turn must wait before its barrier for what was loaded
    ahead of it, as much as a turn loads.
    """
    spans = innermost(code)
    loops = [code[a : b + 1] for a, b in spans]
    straight = [x for i, x in enumerate(code) if not any(a <= i <= b for a, b in spans)]
    ahead = [sum(bool(AMD_LOAD.match(op)) for op, _, _ in loop) for loop in loops]
    return _in_order(straight) and all(_in_order(loop, n) for loop, n in zip(loops, ahead, strict=True) if n)


def _in_order(code: Code, ahead: int = 0) -> bool:
    """Of straight code; or of the first turn of a loop that finds so many loads under way."""
    under_way, ordered = [True] * ahead, ahead == 0  # of each access, oldest first: is it a load to be waited for?
    for op, operands, _ in code:
        if op == "s_waitcnt" and (match := re.search(r"vmcnt\((\d+)\)", operands)):
            under_way = under_way[max(len(under_way) - int(match[1]), 0) :]
        elif op == "s_barrier":
            ordered = ordered or not any(under_way)
        elif AMD_STORE.match(op) and not ordered:
            return False
        elif AMD_ACCESS.match(op):
            under_way.append(ahead == 0 and bool(AMD_LOAD.match(op)))
            ordered = ordered and not under_way[-1]
    return True


def report_sass(text: str, usage: str, shared: int) -> Report:
    """Report from the listing, cuobjdump's line of resources, and the bytes of dynamic shared memory."""
    code = read_sass(text)
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if match is None or not code:
        raise RuntimeError(f"neither registers nor instructions can be read; cuobjdump said {usage[-200:]!r}")
    ops = [op for op, _, _ in code]
    spills, atomics = (sum(bool(p.match(op)) for op in ops) for p in (SPILL, ATOMIC))
    loops = hot_loops(code)
    in_order = all(loop.barrier_before_stores for loop in loops if loop.has_stores)
    return Report(int(match[1]), int(match[2]), shared, spills, atomics, len(ops), loops, in_order)


def report_amd(text: str, shared: int) -> Report:
    """Report from AMD assembly: the numbers its metadata holds, and the order of loads and stores."""

    def number(key: str) -> int:
        match = re.search(rf"\.{key}:\s+(\d+)", text)
        if match is None:
            raise RuntimeError(f"the AMDGPU metadata has no .{key}")
        return int(match[1])

    code = read_amd(text)
    atomics = sum("atomic" in op for op, _, _ in code)
    stack, spills = number("private_segment_fixed_size"), number("vgpr_spill_count")  # scalars spill to vector lanes
    in_order = stores_wait(code)
    return Report(number("vgpr_count"), stack, shared, spills, atomics, len(code), stores_in_order=in_order)


def report(kernel: Any) -> Report:
    """Report of a kernel that Triton compiled."""
    if "amdgcn" in kernel.asm:
        return report_amd(kernel.asm["amdgcn"], kernel.metadata.shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(kernel.asm["cubin"])
    try:
        listing, usage = (_run(*tool, file.name) for tool in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage")))
    finally:
        os.unlink(file.name)
    return report_sass(listing, usage, kernel.metadata.shared)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout
