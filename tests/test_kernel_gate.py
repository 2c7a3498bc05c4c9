"""The gate of the Triton kernels: how it reads listings, that it flags what it is there for, and its verdict."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "bench"

LISTING = """
        /*0000*/                   LDG.E R1, desc[UR4][R2.64] ;
.L_x_0:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64], P0 ;
        /*0020*/                   LDL R9, [R1] ;
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0040*/             @!PT  LDS RZ, [RZ] ;
        /*0050*/                   STG.E.128 desc[UR4][R2.64], R8 ;
        /*0060*/              @P0  BRA `(.L_x_0) ;
.L_x_1:
        /*0070*/                   REDUX.MAX UR4, R0 ;
        /*0080*/                   STG.E.U16 desc[UR4][R2.64], R8 ;
        /*0090*/             @!P1  BRA `(.L_x_1) ;
        /*00a0*/                   RED.E.ADD.F32 desc[UR4][R2.64], R8 ;
        /*00b0*/                   EXIT ;
.L_x_2:
        /*00c0*/                   LDG.E.U16 R1, desc[UR4][R2.64] ;
        /*00d0*/                   BRA `(.L_x_2) ;
"""
USAGE = "Function k:\n  REG:97 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:600"


@pytest.fixture(autouse=True)
def gate_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


def broken_by(**changes: int) -> list[str]:
    from gate.entry import Budget, broken  # pyright: ignore[reportMissingImports]
    from gate.listing import report_sass  # pyright: ignore[reportMissingImports]

    found = report_sass(LISTING, USAGE, 4096)
    generous = {"spills": 9, "atomics": 9, "narrow": 9} | changes
    return broken(found, Budget(**generous), "sm_90", None)


def test_listing_is_read() -> None:
    from gate.listing import report_sass  # pyright: ignore[reportMissingImports]

    found = report_sass(LISTING, USAGE, 4096)
    assert (found.registers, found.stack, found.shared) == (97, 8, 4096)
    assert (found.spills, found.atomics, found.instructions) == (1, 1, 14)
    pipelined, narrow = found.loops  # the loop without loads is not hot
    assert (len(pipelined.opcodes), pipelined.narrow, pipelined.spills) == (6, 0, 1)
    assert pipelined.has_stores and pipelined.barrier_before_stores
    assert (len(narrow.opcodes), narrow.narrow) == (2, 1)
    assert found.hot_instructions == 8


def test_code_out_of_line_is_no_loop() -> None:
    from gate.listing import hot_loops, read_sass  # pyright: ignore[reportMissingImports]

    back = LISTING + "        /*00e0*/                   BRA `(.L_x_0) ;\n"
    assert len(hot_loops(read_sass(back))) == 2


def test_listing_that_says_nothing_is_an_error() -> None:
    from gate.listing import report_sass  # pyright: ignore[reportMissingImports]

    with pytest.raises(RuntimeError, match="neither registers nor instructions"):
        report_sass("", "cannot open file", 0)


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({"registers": 96}, "registers 97 > 96"),
        ({"spills": 0}, "spills 1 > 0"),
        ({"atomics": 0}, "atomics 1 > 0"),
        ({"narrow": 0}, "not 16 bytes wide 1 > 0"),
    ],
)
def test_each_limit_is_held(limit: dict[str, int], message: str) -> None:
    assert broken_by() == []
    (reason,) = broken_by(**limit)
    assert message in reason


def test_instructions_per_element_are_held_and_must_be_found() -> None:
    from gate.entry import Budget, broken  # pyright: ignore[reportMissingImports]
    from gate.listing import Report, report_sass  # pyright: ignore[reportMissingImports]

    found, limits = report_sass(LISTING, USAGE, 0), {"spills": 9, "atomics": 9, "narrow": 9}
    assert broken(found, Budget(per_element={"sm_90": 4}, **limits), "sm_90", 2) == []
    assert broken(found, Budget(per_element={"sm_90": 3.9}, **limits), "sm_90", 2) == [
        "4.0 instructions per element > 3.9"
    ]
    assert broken(found, Budget(per_element={"sm_90": 3.9}, **limits), "sm_80", 2) == []
    no_loop = Report(1, 0, 0, 0, 0, 10)
    assert broken(no_loop, Budget(per_element={"sm_90": 4}), "sm_90", 2) == [
        "no hot loop found to count instructions in"
    ]


def test_missing_barrier_is_seen() -> None:
    from gate.listing import Loop  # pyright: ignore[reportMissingImports]

    assert Loop(["LDG.E.128", "BAR.SYNC", "STG.E.128"]).barrier_before_stores
    assert not Loop(["BAR.SYNC", "LDG.E.128", "STG.E.128"]).barrier_before_stores
    assert not Loop(["LDG.E.128", "STG.E.128", "BAR.SYNC"]).barrier_before_stores


def amd(*lines: str) -> bool:
    from gate.listing import read_amd, stores_wait  # pyright: ignore[reportMissingImports]

    text = "\n".join(line if line.endswith(":") else f"\t{line}" for line in lines)
    return stores_wait(read_amd(text))


def test_amd_code_must_wait_for_its_loads_before_the_barrier() -> None:
    """The barrier alone says nothing of loads under way; a count says that all but so many have arrived."""
    load, store = "global_load_dwordx4 v[0:3], v4, s[0:1]", "buffer_store_dwordx4 v[0:3], v4, s[0:3], 0 offen"
    wait, barrier = "s_waitcnt vmcnt(0) lgkmcnt(0)", "s_barrier"
    assert amd(load, load, wait, barrier, store, store)
    assert not amd(load, barrier, wait, store)
    assert not amd(load, wait, store)
    assert not amd(load, load, "s_waitcnt vmcnt(1)", barrier, store)
    assert not amd(wait, barrier, load, store)
    assert amd(load, "global_load_dword v9, v4, s[0:1]", "s_waitcnt vmcnt(1)", barrier, store)


def test_an_amd_loop_must_wait_for_what_was_loaded_ahead_of_it() -> None:
    load, store = "buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen", "buffer_store_dwordx4 v[0:3], v4, s[0:3], 0 offen"
    back = "s_cbranch_scc1 .LBB0_1"
    for count, right in ((0, True), (1, True), (2, False)):
        loop = (load, f"s_waitcnt vmcnt({count})", "s_barrier", store, back)
        assert amd(".LBB0_1:", *loop) == right
    assert not amd(".LBB0_1:", load, "s_barrier", "s_waitcnt vmcnt(0)", store, back)


def test_stores_that_do_not_wait_break_a_budget_that_asks_for_it() -> None:
    from gate.entry import Budget, broken  # pyright: ignore[reportMissingImports]
    from gate.listing import Report  # pyright: ignore[reportMissingImports]

    racy = Report(1, 0, 0, 0, 0, 10, stores_in_order=False)
    assert broken(racy, Budget(), "gfx942", None) == []
    (reason,) = broken(racy, Budget(barrier_before_stores=True), "gfx942", None)
    assert "may not have their loads yet" in reason


PLANTED = """
import sys, torch
sys.path.insert(0, {bench!r})
import kernel_gate
from gate.entries.rows import padded, ppo, row_entry
from gate.targets import TARGETS

target = next(target for target in TARGETS if target.name == "sm_90")
for name, multiple in (("padded", 64), ("unpadded", 1)):
    x = padded(128255, torch.bfloat16, multiple)
    (line,) = kernel_gate.lines(row_entry(name, lambda: ppo(x, x, entropy=False), 15), target)
    print(name, line.broken)
"""


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT)


def test_rows_without_padding_are_flagged() -> None:
    """A ragged vocabulary keeps 16-byte loads if its rows are padded, and loses them if they are not."""
    done = run_python("-c", PLANTED.format(bench=str(BENCH)))
    assert done.returncode == 0, done.stderr
    padded, unpadded = done.stdout.splitlines()[-2:]
    assert padded == "padded []"
    assert unpadded.startswith("unpadded") and "not 16 bytes wide" in unpadded


@pytest.mark.slow
def test_every_kernel_keeps_its_budget() -> None:
    done = run_python(str(BENCH / "kernel_gate.py"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 of " in done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_interpreter_is_left_before_anything_is_compiled() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, str(BENCH / "kernel_gate.py"), "--targets", "sm_90"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "TRITON_INTERPRET is set" in done.stdout
