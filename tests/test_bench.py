"""`fastppo bench`: what it compares, counts, refuses and prints. No time is asserted."""

import json
import math
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from fastppo import models
from fastppo.bench import (
    arguments,
    command,
    compare,
    end_to_end,
    harness,
    lengths,
    pages,
    pictures,
    records,
    shapes,
    step,
    work,
)
from fastppo.bench.clock import Clock
from fastppo.bench.command import bench
from fastppo.bench.machine import UNKNOWN, commit_of, cpu_name, machine, seconds_per_call
from fastppo.bench.ops import OPS
from fastppo.bench.step_settings import parser, settings
from fastppo.checks import InputError
from fastppo.cli import main

Record = records.Record
ROOT = Path(__file__).parent.parent
PARAMETERS = {  # of the checkpoints, tied heads counted once
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "llama-3.1-8b": 8_030_261_248,
}


def measured(draw: random.Random, *, slower: float = 1.0, machine: float = 1.0, rounds: int = 9) -> list[Record]:
    """Records of ten ops: each round has its own noise, and a slow minute meets op and yardstick alike."""
    out = []
    for i in range(10):
        minutes = [machine * math.exp(draw.gauss(0, 0.03)) for _ in range(rounds)]
        times = [(i + 1) * slower * m * math.exp(draw.gauss(0, 0.04)) for m in minutes]
        ticks = [2.0 * m * math.exp(draw.gauss(0, 0.02)) for m in minutes]
        out.append(record(f"op{i}", times, ticks))
    return out


def record(op: str, times: list[float], ticks: list[float] | None = None, variant: str = "fastppo") -> Record:
    here = {"device": "cpu", "threads": 1, "commit": "abc", "versions": {}, "copy_gb_per_s": 10.0, "by_threads": {}}
    head = {"suite": "kernels", "op": op, "setting": {"R": 4}, "variant": variant, "machine": here}
    return head | {"rounds_ms": times, records.YARDSTICK: ticks or [], "median_ms": sorted(times)[len(times) // 2]}


def written(path: Path, lines: list[Record]) -> Path:
    path.unlink(missing_ok=True)
    records.append(path, lines)
    return path


@pytest.mark.parametrize("seed", range(10))
def test_a_slow_down_of_a_third_is_caught_and_a_rerun_is_silent(seed: int, tmp_path: Path, capsys):
    draw = random.Random(seed)
    old = written(tmp_path / "old.jsonl", measured(draw))
    again = written(tmp_path / "again.jsonl", measured(draw))
    slow = written(tmp_path / "slow.jsonl", measured(draw, slower=1.3))
    assert bench(["compare", str(old), str(again)]) == 0
    assert "10 measurements compared, 0 moved" in capsys.readouterr().out
    assert bench(["compare", str(old), str(slow)]) == 1
    assert capsys.readouterr().out.count("SLOWER") == 10


def test_a_change_within_the_bands_of_the_rounds_is_noise(tmp_path: Path, capsys):
    wide = [1.0, 1.0, 1.0, 1.0, 1.0, 1.5, 1.5, 1.5, 1.5]
    old = written(tmp_path / "old", [record("a", wide)])
    new = written(tmp_path / "new", [record("a", [x * 1.3 for x in wide])])
    assert bench(["compare", str(old), str(new)]) == 0 and "0 moved" in capsys.readouterr().out


@pytest.mark.parametrize("factor", [1.3, 0.7])
def test_a_machine_that_changed_its_speed_is_no_regression(factor: float, tmp_path: Path, capsys):
    draw = random.Random(0)
    old = written(tmp_path / "old.jsonl", measured(draw))
    new = written(tmp_path / "new.jsonl", measured(draw, machine=factor))
    assert bench(["compare", str(old), str(new)]) == 0 and "0 moved" in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("factor", [1.4, 0.7])
def test_a_yardstick_that_changed_its_speed_is_no_change(factor: float, seed: int, tmp_path: Path, capsys):
    draw = random.Random(seed)
    old, new = measured(draw, rounds=25), measured(draw, rounds=25)
    new = [line | {records.YARDSTICK: [factor * x for x in line[records.YARDSTICK]]} for line in new]
    old, new = written(tmp_path / "old", old), written(tmp_path / "new", new)
    assert bench(["compare", str(old), str(new)]) == 0 and "0 moved" in capsys.readouterr().out


def slower(tmp_path: Path, old: list[Record], new: list[Record]) -> bool:
    return bench(["compare", str(written(tmp_path / "old", old)), str(written(tmp_path / "new", new))]) == 1


def test_a_yardstick_that_was_disturbed_hides_nothing(tmp_path: Path):
    disturbed = [2.0, 1.0, 2.0, 1.0, 1.0] * 5
    assert slower(tmp_path, [record("a", [1.0] * 25, disturbed)], [record("a", [1.3] * 25, disturbed)])


def test_a_machine_that_slows_down_all_along_hides_nothing(tmp_path: Path):
    drift = [1.04**i for i in range(25)]
    assert slower(tmp_path, [record("a", drift, drift)], [record("a", [1.3 * x for x in drift], drift)])
    assert not slower(tmp_path, [record("a", drift, drift)], [record("a", drift, drift)])


def test_many_rounds_are_held_to_their_middle_half_and_few_to_more(tmp_path: Path):
    def told(rounds: list[float]) -> bool:
        return slower(tmp_path, [record("a", rounds)], [record("a", [1.2 * x for x in rounds])])

    assert told([0.7] * 9 + [1.0] * 22 + [1.4] * 9)  # 22 % of them on either side
    assert not told([0.7] * 3 + [1.0] * 6 + [1.4] * 3)
    assert told([0.7] * 2 + [1.0] * 8 + [1.4] * 2) and not told([0.7] + [1.0] * 5 + [1.4])


def test_on_a_gpu_less_is_noise(tmp_path: Path):
    lines = [record("a", [x] * 9) for x in (1.0, 1.12)]
    assert not slower(tmp_path, lines[:1], lines[1:])
    for line in lines:
        del line["machine"]["by_threads"]
    assert slower(tmp_path, lines[:1], lines[1:])


def test_runs_appended_to_one_file_keep_their_own_yardsticks(tmp_path: Path):
    fast, slow = record("a", [1.0] * 9, [1.0] * 9), record("a", [2.0] * 9, [2.0] * 9)
    times = next(iter(compare.times_of([fast, slow]).values()))
    assert times.relative == [1.0] * 18 and len(times.rounds) == 18


@pytest.mark.parametrize("seed", range(5))
def test_a_slow_down_is_caught_on_a_machine_that_became_faster(seed: int, tmp_path: Path, capsys):
    draw = random.Random(seed)
    old = written(tmp_path / "old", measured(draw))
    new = written(tmp_path / "new", measured(draw, slower=1.3, machine=0.92))
    assert bench(["compare", str(old), str(new)]) == 1 and capsys.readouterr().out.count("SLOWER") == 10


def test_what_became_faster_is_told_and_is_no_error(tmp_path: Path, capsys):
    draw = random.Random(0)
    old = written(tmp_path / "old.jsonl", measured(draw))
    new = written(tmp_path / "new.jsonl", measured(draw, slower=0.6))
    assert bench(["compare", str(old), str(new)]) == 0 and capsys.readouterr().out.count("faster 0.") == 10


def test_the_limit_is_the_users_and_peers_are_not_judged(tmp_path: Path):
    old = [record("a", [1.0] * 9), record("a", [1.0] * 9, variant="torch eager")]
    old, new = written(tmp_path / "old", old), tmp_path / "new"
    written(new, [record("a", [1.2] * 9), record("a", [9.0] * 9, variant="torch eager")])
    limits = {limit: bench(["compare", str(old), str(new), "--max-ratio", str(limit)]) for limit in (1.1, 1.25)}
    assert limits == {1.1: 1, 1.25: 0}


def test_what_can_no_longer_be_measured_is_an_error(tmp_path: Path, capsys):
    both = [record("a", [1.0] * 9), record("b", [1.0] * 9)]
    gone = {key: value for key, value in record("b", [1.0]).items() if "ms" not in key} | {"skipped": "out of memory"}
    old, new = written(tmp_path / "old", both), written(tmp_path / "new", [both[0], gone])
    assert bench(["compare", str(old), str(new)]) == 1
    assert "LOST  kernels b fastppo R=4: not timed any more, out of memory" in capsys.readouterr().out
    assert bench(["compare", str(old), str(written(tmp_path / "part", both[:1]))]) == 0


def test_files_that_share_nothing_and_lines_that_are_no_records_are_refused(tmp_path: Path):
    one, other = written(tmp_path / "one", [record("a", [1.0])]), written(tmp_path / "two", [record("b", [1.0])])
    with pytest.raises(InputError, match="nothing to compare"):
        bench(["compare", str(one), str(other)])
    (tmp_path / "text").write_text('{"op": "a"}\n')
    with pytest.raises(InputError, match="line 1 is no measurement"):
        bench(["compare", str(one), str(tmp_path / "text")])
    with pytest.raises(InputError, match="no such file"):
        bench(["kernels", "--out", str(tmp_path / "new"), "--compare", str(tmp_path / "none")])
    with pytest.raises(InputError, match="--compare needs --out"):
        bench(["kernels", "--compare", str(one)])


def test_two_generations_of_one_name_are_two_machines():
    core = "processor\t: {}\nmodel\t\t: {}\nmodel name\t: AMD EPYC\ncpu family\t: {}\n\n"
    older, newer = ("".join(core.format(i, *kind) for i in range(2)) for kind in ((17, 25), (2, 26)))
    assert cpu_name(older) == "2 x AMD EPYC (family 25, model 17)" != cpu_name(newer)
    assert cpu_name("model name : Cortex\n") == "1 x Cortex" and cpu_name("") == ""


def test_the_command_refuses_a_suite_it_has_not(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "speed"])
    assert ended.value.code == 2 and "no suite 'speed': there are kernels, step" in capsys.readouterr().err


def case(ours: float, theirs: float) -> harness.Case:
    def of(value: float) -> harness.Variant:
        return harness.Variant(run=lambda: {"x": torch.full((2,), value)})

    truth = {"x": torch.ones(2, dtype=torch.float64)}
    variants = {"fastppo": of(ours), "peer": of(theirs), "absent": "not installed"}
    return harness.Case(op="op", setting={"R": 2}, variants=variants, truth=truth, tolerance=1e-3, num_bytes=8)


def options(*argv: str) -> Any:
    return arguments.start(arguments.parser(None), ["--device", "cpu", "--seconds", "0.01", "--threads", "1", *argv])


def test_a_red_check_prints_no_speed(tmp_path: Path, capsys):
    out = tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match="error .* exceeds"):
        harness.measure(case(1.01, 1.0), options("--out", str(out)))
    assert not out.exists() and capsys.readouterr().out == ""
    lines = {r["variant"]: r for r in harness.measure(case(1.0, 1.1), options("--out", str(out)))}
    assert "median_ms" not in lines["peer"] and "exceeds" in lines["peer"]["skipped"]
    assert lines["absent"]["skipped"] == "not installed" and lines["fastppo"]["median_ms"] > 0
    assert {r["variant"] for r in records.read(out)} == {"fastppo", "peer", "absent"}


def test_going_on_leaves_out_what_is_there(tmp_path: Path):
    out, made = str(tmp_path / "out"), case(1.0, 1.0)
    arguments.run(arguments.parser(None), lambda _: [made], ["--device", "cpu", "--seconds", "0.01", "--out", out])
    before = (tmp_path / "out").read_bytes()
    again = ["--device", "cpu", "--seconds", "0.01", "--out", out, "--go-on"]
    arguments.run(arguments.parser(None), lambda _: [made], again)
    assert (tmp_path / "out").read_bytes() == before
    arguments.run(arguments.parser(None), lambda _: [made], again[:-1])
    assert len(records.read(tmp_path / "out")) == 2 * 3


def test_a_wrong_result_stops_no_other_and_is_told_at_the_end(tmp_path: Path, capsys):
    out = tmp_path / "out"
    argv = ["--device", "cpu", "--seconds", "0.01", "--out", str(out)]
    wrong, right = (replace(case(x, 1.0), op=name) for x, name in ((1.01, "wrong"), (1.0, "right")))
    with pytest.raises(ValueError, match="not timed:\nwrong R=2: .*exceeds"):
        arguments.run(arguments.parser(None), lambda _: [wrong, right], argv)
    found = {(r["op"], r["variant"]): r for r in records.read(out)}
    assert "exceeds" in found["wrong", "fastppo"]["skipped"] and found["right", "fastppo"]["median_ms"] > 0
    mended = replace(wrong, variants=case(1.0, 1.0).variants)
    arguments.run(arguments.parser(None), lambda _: [mended], [*argv, "--go-on"])
    assert records.read(out)[-3]["op"] == "wrong" and records.read(out)[-3]["median_ms"] > 0
    assert "NOT TIMED wrong R=2" in capsys.readouterr().out


def test_a_case_that_cannot_be_made_stops_no_other_op():
    done: list[str] = []

    def broken() -> None:
        raise torch.OutOfMemoryError("too large")

    with pytest.raises(InputError, match="OutOfMemoryError: too large"):
        arguments.each([broken, lambda: done.append("next")])
    assert done == ["next"]


def test_what_was_measured_is_no_change_of_the_code(tmp_path: Path):
    """The name of a commit is that of the code, and changes to the code have a name each."""
    code, result = tmp_path / "pyproject.toml", tmp_path / "bench" / "results" / "cpu.jsonl"
    result.parent.mkdir(parents=True)
    code.touch()
    result.touch()
    who = ["-c", "user.name=x", "-c", "user.email=x"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    clean = commit_of(tmp_path)
    result.write_text("more")
    assert commit_of(tmp_path) == clean and "dirty" not in clean
    names = {clean}
    for text in ("one", "two"):
        code.write_text(text)
        names.add(commit_of(tmp_path))
    assert len(names) == 3 and all(name.startswith(clean) for name in names)
    assert commit_of(tmp_path / "bench") == UNKNOWN


@pytest.mark.parametrize("name", arguments.SAME)
def test_going_on_measures_again_what_another_machine_or_commit_had(tmp_path: Path, name: str):
    out, argv = tmp_path / "out", ["--device", "cpu", "--seconds", "0.01", "--go-on", "--out", str(tmp_path / "out")]
    arguments.run(arguments.parser(None), lambda _: [case(1.0, 1.0)], argv)
    lines = [{**r, "machine": {**r["machine"], name: "another"}} for r in records.read(out)]
    out.unlink()
    records.append(out, lines)
    arguments.run(arguments.parser(None), lambda _: [case(1.0, 1.0)], argv)
    assert len(records.read(out)) == 2 * len(lines)


def test_caches_are_overwritten_before_every_call_and_not_timed():
    done: list[str] = []

    def slow() -> None:
        done.append("before")
        time.sleep(0.02)

    wall, _ = seconds_per_call(lambda: done.append("run"), 3, "cpu", slow)
    assert done == ["before", "run"] * 3 and wall < 0.01


def test_a_variant_of_another_precision_is_held_to_its_own_floor():
    made = case(1.0, 1.0)
    half = harness.Variant(run=lambda: {}, num_bytes=4, dtype=torch.bfloat16)
    assert made.work(half).num_bytes == 4 == made.work(harness.Variant(run=lambda: {})).num_bytes / 2
    assert made.work(half).dtype == torch.bfloat16 != made.work(harness.Variant(run=lambda: {})).dtype


def test_all_suites_take_only_what_each_of_them_has(monkeypatch: pytest.MonkeyPatch, capsys):
    ran: list[list[str]] = []
    monkeypatch.setattr(command, "SUITES", {"kernels": ran.append, "end-to-end": ran.append})
    with pytest.raises(SystemExit) as ended:
        main(["bench", "all", "--repeats", "3"])
    assert ended.value.code == 2 and "unrecognized arguments: --repeats 3" in capsys.readouterr().err
    assert ran == []
    assert bench(["all", "--quick"]) == 0 and ran == [["--quick"], ["--quick", "--device", "cpu"]]


def test_what_was_compared_with_nothing_has_no_error(tmp_path: Path):
    made = case(1.0, 1.0)
    made.variants["products"] = harness.Variant(run=lambda: {}, truth={})
    lines = {r["variant"]: r for r in harness.measure(made, options())}
    assert "error" not in lines["products"] and lines["peer"]["error"] == 0


def test_a_record_says_what_it_belongs_to(tmp_path: Path):
    (line, *_) = harness.measure(case(1.0, 1.0), options("--out", str(tmp_path / "out"), "--seed", "7"))
    (kept, *_) = records.read(tmp_path / "out")
    here = kept["machine"]
    assert here["seed"] == 7 and here["versions"]["torch"] == torch.__version__ and here["commit"]
    assert here["by_threads"]["1"]["copy_gb_per_s"] > 0 and here["matmul_bfloat16_gflop_per_s"] > 0
    assert len(line["rounds_ms"]) == len(line[records.YARDSTICK]) >= harness.LEAST_ROUNDS
    assert line["p20_ms"] <= line["median_ms"] <= line["p80_ms"]


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_cases_that_pass_their_check(op: str):
    chosen = ["--quick", "--device", "cpu", "--dtypes", "float32"]
    found = list(OPS[op].cases(arguments.start(OPS[op].parser(), chosen)))
    for made in found[:2]:
        ours = made.variants["fastppo"]
        assert isinstance(ours, harness.Variant) and harness.check(ours, made) <= made.tolerance
        assert made.num_bytes > 0 and made.tokens > 0


@pytest.mark.parametrize(("shape", "count"), PARAMETERS.items())
def test_shapes_are_those_of_the_checkpoints(shape: str, count: int):
    assert shapes.num_parameters(shapes.config_of(shape)) == count


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_parameters_are_counted_as_the_model_has_them(shape: str):
    small = {"vocab_size": 96, "num_hidden_layers": 2, "hidden_size": 56, "intermediate_size": 24}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 14}
    config = shapes.config_of(shape, **small, **(heads if shape.startswith("llama") else dict(list(heads.items())[:2])))
    assert shapes.num_parameters(config) == sum(p.numel() for p in models.new_causal_lm(config).parameters())


def test_an_unknown_shape_is_refused():
    with pytest.raises(InputError, match="no shape 'qwen9': there are llama-3.1-8b"):
        shapes.config_of("qwen9")


@pytest.mark.parametrize("kind", lengths.LENGTHS)
@pytest.mark.parametrize(("count", "mean"), [(64, 48), (5, 1), (3, 7), (512, 512)])
def test_every_distribution_of_lengths_holds_the_same_tokens(kind: str, count: int, mean: int):
    found = lengths.lengths(kind, count, mean, torch.Generator().manual_seed(0))
    assert len(found) == count and sum(found) == count * mean and min(found) >= 1
    assert max(found) <= lengths.LONGEST * mean
    if count > 64 and kind == "long-tailed":
        assert max(found) > 4 * mean and sorted(found)[count // 2] < 0.8 * mean


def test_operations_are_those_that_pytorch_counts():
    """Of a forward of one sequence with every row through the head, but for the causal half of attention."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    config = shapes.config_of("tiny", vocab_size=512)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    sizes, n = work.Sizes.of(model), 33
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, n, dtype=torch.int64))
    half = 4 * config.num_hidden_layers * config.hidden_size * (n * n - n * (n + 1) / 2)
    norms = 2 * n * sum(p.numel() for name, p in model.named_parameters() if "norm" in name or "bias" in name)
    assert sizes.forward([n], n) == pytest.approx(counter.get_total_flops() - half + norms)


def test_a_phase_inside_another_counts_once(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr("fastppo.bench.clock.time.perf_counter", lambda: now[0])

    class Owner:
        def forward(self, x: int) -> int:
            now[0] += 5
            return x

    owner, clock = Owner(), Clock("cpu")
    clock.around(owner, "forward", lambda x: f"forward{x}")
    with clock("outer"):
        now[0] += 1
        assert [owner.forward(i) for i in (1, 2, 1)] == [1, 2, 1]
        now[0] += 2
    now[0] += 100
    with clock("outer"):
        now[0] += 4
    assert clock.seconds == {"outer": 7.0, "forward1": 10.0, "forward2": 5.0}


@pytest.mark.slow
def test_an_iteration_is_measured_phase_by_phase(tmp_path: Path, capsys):
    out = tmp_path / "step.jsonl"
    argv = ["step", "--quick", "--device", "cpu", "--threads", "1", "--sweep", "skew", "--out", str(out)]
    assert bench(argv) == 0
    lines = records.read(out)
    by_lengths = {kind: [r for r in lines if r["setting"]["lengths"] == kind] for kind in lengths.LENGTHS}
    for kind, found in by_lengths.items():
        timed = {r["op"]: r for r in found if r["setting"]["training"] == "full"}
        assert list(timed) == ["rollout", "reward", "reference", "values", "advantages", "update", "iteration"]
        phases = [timed[p]["rounds_ms"] for p in list(timed)[:-1]]
        assert [sum(r) for r in zip(*phases, strict=True)] == pytest.approx(timed["iteration"]["rounds_ms"], rel=5e-3)
        assert timed["update"]["least_flops"] == pytest.approx(
            6 * (timed["reference"]["least_flops"] + timed["values"]["least_flops"]), rel=1e-3
        )
        assert all(r["peak_mb"] > 0 for r in timed.values())
        assert ("times_fixed" in timed["update"]) == (kind != "fixed")
        (adapters, *_) = [r for r in found if r["setting"]["training"] == "lora" and r["op"] in ("update", "iteration")]
        if "skipped" in adapters:
            assert "needs the package peft" in adapters["skipped"]
        else:
            assert adapters["least_flops"] == pytest.approx(timed["update"]["least_flops"] * 2 / 3, rel=1e-3)
    assert "x fixed" in capsys.readouterr().out


def test_an_update_that_did_not_do_its_steps_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    stats = {"val/ratio_max_first": 1.5, "policy/steps": 4.0}
    monkeypatch.setattr(step, "iterate", lambda *_: stats)
    chosen = settings(parser(None).parse_args(["--training", "full"]))[0]
    made, rewards, _ = step.build(chosen, "cpu", 0)
    with pytest.raises(ValueError, match=r"not timed: 4 optimizer steps, and a ratio of 1\.5"):
        step.checked(made, rewards, step.batch_of(chosen, 0)[0], chosen, "cpu")


def test_what_does_not_fit_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(step, "memory_bytes", lambda device: 24 * 2**30)
    (chosen,) = settings(parser(None).parse_args(["--training", "full", "--shape", "qwen2.5-7b"]))
    why = step.cannot(chosen, "cpu")
    assert why is not None and why.endswith("of 24 GiB")
    (line,) = step.skipped([chosen], why)
    assert line["op"] == "iteration" and line["skipped"] == why


def product(dtype: str, rate: float, held: str | None = None, **setting: Any) -> Record:
    """An op of many operations per byte, on a machine of 100 GFLOP/s in float32 and 200 in bfloat16.

    Args:
        held: the dtype whose rate it was held to, if not its own.
    """
    line = record("a<b", [1.0]) | {"setting": {"dtype": dtype, **setting}}
    line["machine"] |= {"matmul_float32_gflop_per_s": 100.0, "matmul_bfloat16_gflop_per_s": 200.0}
    peak = line["machine"][f"matmul_{held or dtype}_gflop_per_s"]
    return line | {"least_flops": 1e9, "least_bytes": 1e6, "gflop_per_s": rate, "mfu": rate / peak}


def drawn(suite: str, lines: list[Record], tag: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(pages.drawn(suite, lines) or "").iter("{http://www.w3.org/2000/svg}" + tag))


def test_pictures_are_well_formed():
    (point,) = drawn("kernels", [product("float32", 50.0, R=4)], "circle")
    assert point[0].text == "a<b float32: 50 GFLOP/s"
    bars = [record(op, [3.0]) for op in ("rollout", "update")]
    assert len(ElementTree.fromstring(pictures.phase_bars(bars, step.PHASES))) == 1 + 2 * 7 + 1 + 7 + 1


def test_no_two_points_share_a_title():
    settings = [{"gradient": g, "H": h} for g in (False, True) for h in (8, 16)] + [{"length": n} for n in (4, 8)]
    lines = [product(dtype, 50.0, **s) for dtype in ("float32", "bfloat16") for s in settings]
    assert len({point[0].text for point in drawn("kernels", lines, "circle")}) == len(lines) == 12


@pytest.mark.parametrize("dtypes", [("float32",), ("bfloat16",), ("float32", "bfloat16")])
def test_a_roof_is_of_a_dtype_that_has_points(dtypes: tuple[str, ...]):
    peaks = {"float32": 100.0, "bfloat16": 200.0}
    lines = [product(dtype, peaks[dtype]) for dtype in dtypes]
    said = [text.text for text in drawn("kernels", lines, "text") if (text.text or "").startswith("matmul")]
    assert sorted(map(str, said)) == sorted(f"matmul {dtype} {peaks[dtype]:g} GFLOP/s" for dtype in dtypes)
    roofs = {line.attrib["stroke"]: line.attrib["points"] for line in drawn("kernels", lines, "polyline")}
    assert len(roofs) == len(dtypes)
    for point in drawn("kernels", lines, "circle"):  # at its dtype's peak: on the flat part of the roof of its color
        assert roofs[point.attrib["fill"]].split(",")[-1] == point.attrib["cy"]


def test_what_a_cpu_multiplies_in_float32_stands_under_the_roof_of_float32():
    lines = [product("bfloat16", 80.0, held="float32")]
    (said,) = [t.text for t in drawn("kernels", lines, "text") if (t.text or "").startswith("matmul")]
    assert said == "matmul float32 100 GFLOP/s"


def test_there_is_no_roofline_of_nothing_timed():
    peers = product("float32", 50.0) | {"variant": "peer"}
    ours = {k: peers[k] for k in ("op", "suite", "setting", "machine")} | {"variant": "fastppo", "skipped": "wrong"}
    assert pages.drawn("kernels", [peers, ours]) is None


def test_every_setting_has_a_bar_of_its_own():
    base = {"shape": "tiny", "dtype": "float32", "training": "full", "lengths": "fixed", "prompts": 64, "epochs": 2}
    changes: list[dict[str, Any]] = [{}, {"training": "lora"}, {"prompts": 128}, {"training": "lora", "prompts": 128}]
    lines = []
    for i, change in enumerate(changes):
        for ms, op in ((1.0 + i, "rollout"), (100.0, "update")):
            lines.append(record(op, [ms]) | {"setting": base | change})
    lines += [line | {"machine": line["machine"] | {"threads": 2}, "median_ms": 500.0} for line in lines[:2]]
    texts = [text.text for text in drawn("step", lines, "text")][len(step.PHASES) :]
    assert texts[1::2] == ["101 ms", "102 ms", "103 ms", "104 ms", "1000 ms"]
    assert texts[::2] == [
        *("threads=1 tiny float32 full prompts=64", "threads=1 tiny float32 lora prompts=64"),
        *("threads=1 tiny float32 full prompts=128", "threads=1 tiny float32 lora prompts=128"),
        "threads=2 tiny float32 full prompts=64",
    ]


def test_the_committed_page_and_pictures_are_those_of_the_committed_results(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    made = pages.pages(Path("bench/results"), Path("docs/benchmarks.md"))
    stale = [str(path) for path, text in made.items() if not path.exists() or path.read_text("utf-8") != text]
    assert stale == [], "run `fastppo bench report`"
    assert {str(p) for p in Path("bench/results").glob("*.svg")} == {str(p) for p in made if p.suffix == ".svg"}


def test_a_page_has_a_table_for_what_was_timed_and_a_reason_for_what_was_not(tmp_path: Path):
    here = {"device": "A GPU", "threads": 1, "commit": "abc", "versions": {"torch": "2.13"}, "copy_gb_per_s": 10.0}
    lines = [record("a", [1.0]), record("a", [2.0], variant="peer")]
    lines = [line | {"machine": here, "median_ms": 1.5} for line in lines] + [
        {"suite": "kernels", "op": "a", "setting": {"R": 4}, "variant": "absent", "skipped": "no", "machine": here}
    ]
    written(tmp_path / "results" / "x.jsonl", [*lines, lines[0] | {"median_ms": 9.25}])
    (text,) = pages.pages(tmp_path / "results", tmp_path / "docs" / "page.md").values()
    assert "## A GPU" in text and "absent: not timed, no" in text and "torch 2.13" in text
    assert "| fastppo | 9.25 |  |" in text and "1.5" in text and text.count("| fastppo |") == 1  # the last one counts


@pytest.mark.parametrize("again", [set[str](), {"fastppo"}, {"fastppo", "a peer"}, {"fastppo", "a peer", "another"}])
def test_a_ratio_is_the_quotient_of_the_table_or_says_what_it_is_over(again: set[str], tmp_path: Path):
    """However much of a run was measured again."""
    first = {"fastppo": 500.0, "a peer": 1000.0, "another": 4000.0}
    second = {name: 1.25 * ms for name, ms in first.items() if name in again}
    lines = []
    for commit, run in (("abc", first), ("def", second)):
        for name, ms in run.items():
            line = record("a", [ms], variant=name) | {"times_fastppo": ms / run["fastppo"], "note": "slow"}
            lines.append(line | {"machine": line["machine"] | {"commit": commit}})
    written(tmp_path / "results" / "x.jsonl", lines)
    (page,) = pages.pages(tmp_path / "results", tmp_path / "docs" / "page.md").values()
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in page.splitlines() if row.endswith(" |")][2:]
    shown = {name: float(ms) for name, ms, *_ in rows}
    assert shown == first | second
    for name, ms, ratio, note in rows:
        over = shown["fastppo"] if note == "slow" else float(note.split("over about ")[1].split()[0])
        assert float(ms) / over == float(ratio)
        assert (note == "slow") == ((name in again) == ("fastppo" in again)), note


def test_numbers_of_threads_do_not_share_a_table(tmp_path: Path):
    folder, docs = tmp_path / "results", tmp_path / "docs" / "page.md"
    folder.mkdir()
    lines = [record("a", [8.0] * 9), record("a", [80.0] * 9, variant="torch eager"), record("a", [4.0] * 9)]
    lines[2]["machine"] = lines[2]["machine"] | {"threads": 2}
    records.append(folder / "one.jsonl", lines)
    page = pages.pages(folder, docs)[docs]
    assert page.count("| fastppo |") == 2 and "**a threads=1 R=4**" in page and "**a threads=2 R=4**" in page


def test_a_floor_is_of_the_rates_that_are_written_down():
    made, here = records.numbers([1.0], records.Work(2e9, 3e9), "cpu"), machine("cpu")
    copy, matmul = 2 / here["copy_gb_per_s"], 3 / here["matmul_float32_gflop_per_s"]
    assert made["floor_ms"] == pytest.approx(1e3 * max(copy, matmul), rel=1e-2)  # they are rounded
    assert made["mfu"] == pytest.approx(matmul, rel=1e-2)


def test_records_are_json_without_nan():
    made = records.numbers([0.1, 0.2], records.Work(1e6), "cpu") | records.shortened({"cpu_ms": math.nan})
    assert "NaN" not in json.dumps(made, allow_nan=False)


def test_a_peer_that_cannot_run_is_said_before_anything_is_timed(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interpreter that was asked for is an error, this one without the peer is a remark."""
    monkeypatch.setattr(end_to_end, "run", lambda *_: pytest.fail("something was timed"))
    without = tmp_path / "python"
    without.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'trl'\" >&2\nexit 1\n")
    without.chmod(0o755)
    for python, why in ((without, "ModuleNotFoundError: No module named 'trl'"), (tmp_path / "no", "No such file")):
        with pytest.raises(SystemExit) as ended:
            main(["bench", "end-to-end", "--quick", "--trl-python", str(python)])
        err = capsys.readouterr().err
        assert ended.value.code == 2 and "--trl-python: TRL 1.12.0 PPOTrainer cannot run" in err and why in err
    monkeypatch.setattr(end_to_end.sys, "executable", str(without))
    assert end_to_end.absent(None) == {end_to_end.TRL: "ModuleNotFoundError: No module named 'trl'"}
    assert "only fastppo is timed" in capsys.readouterr().out


def test_rates_are_measured_on_a_cpu_without_avx512() -> None:
    """oneDNN has products of bfloat16 for some CPUs alone."""
    code = "import torch; from fastppo.bench.machine import matmul_rate as r; print(r('cpu', torch.bfloat16) > 0)"
    older = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], env=older, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
