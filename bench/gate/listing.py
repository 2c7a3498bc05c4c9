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
LABEL = re.compile(r"^(\.L_x_\d+):")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")
LOAD, STORE = re.compile(r"(LDG|LDGSTS)\b"), re.compile(r"STG\b")
SPILL = re.compile(r"(LDL|STL)\b")
ATOMIC = re.compile(r"(ATOM|ATOMG|ATOMS|RED)\b")


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

    @property
    def hot_instructions(self) -> int:
        """Of one turn of every hot loop."""
        return sum(len(loop.opcodes) for loop in self.loops)


def read_sass(text: str) -> list[tuple[str, str, str | None]]:
    """(opcode, operands, label ahead of it or None) of each instruction of an nvdisasm listing."""
    found, label = [], None
    for line in text.splitlines():
        if match := LABEL.match(line):
            label = match[1]
        elif match := INSTRUCTION.match(line):
            found.append((match[1], match[2], label))
            label = None
    return found


def hot_loops(code: list[tuple[str, str, str | None]]) -> list[Loop]:
    """Innermost loops of a listing that load from global memory.

    A jump backwards closes a loop, unless an EXIT stands in between: then it leaves code placed out of line.
    """
    places = {label: i for i, (_, _, label) in enumerate(code) if label}
    spans = []
    for i, (op, operands, _) in enumerate(code):
        match = re.search(r"\.L_x_\d+", operands) if op.startswith("BRA") else None
        start = places.get(match[0], i) if match else i
        if start < i and not any(other.startswith("EXIT") for other, _, _ in code[start:i]):
            spans.append((start, i))
    inner = [(a, b) for a, b in spans if not any((c, d) != (a, b) and a <= c and d <= b for c, d in spans)]
    loops = [Loop([op for op, _, _ in code[a : b + 1]]) for a, b in inner]
    return [loop for loop in loops if any(LOAD.match(op) for op in loop.opcodes)]


def report_sass(text: str, usage: str, shared: int) -> Report:
    """Report from the listing, cuobjdump's line of resources, and the bytes of dynamic shared memory."""
    code = read_sass(text)
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if match is None or not code:
        raise RuntimeError(f"neither registers nor instructions can be read; cuobjdump said {usage[-200:]!r}")
    ops = [op for op, _, _ in code]
    spills, atomics = (sum(bool(p.match(op)) for op in ops) for p in (SPILL, ATOMIC))
    return Report(int(match[1]), int(match[2]), shared, spills, atomics, len(ops), hot_loops(code))


def report_amd(text: str, shared: int) -> Report:
    """Report from AMD assembly: the numbers its metadata holds; loops are not looked for."""

    def number(key: str) -> int:
        match = re.search(rf"\.{key}:\s+(\d+)", text)
        if match is None:
            raise RuntimeError(f"the AMDGPU metadata has no .{key}")
        return int(match[1])

    ops = re.findall(r"^\t([a-z_][a-z0-9_]+)\b(?!:)", text, re.MULTILINE)
    atomics = sum("atomic" in op for op in ops)
    stack, spills = number("private_segment_fixed_size"), number("vgpr_spill_count")  # scalars spill to vector lanes
    return Report(number("vgpr_count"), stack, shared, spills, atomics, len(ops))


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
