"""`fastppo train --profile`: the trace and its table are there, name every phase, and change nothing."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.autograd.profiler_util import EventList, FunctionEvent

import runs
from fastppo import train
from fastppo.cli import main
from fastppo.tracing import LISTED, table

PHASES = ("rollout", "reward", "score", "update")


def without_times(path: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in runs.rows(path)]


def test_a_profiled_run_is_the_same_run_and_names_its_phases(tmp_path: Path):
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    for folder in (plain, profiled):
        folder.mkdir()
    config = runs.config(plain, train={"total_steps": 3})
    train(config)
    main(["train", runs.run_file(profiled, train={"total_steps": 3}), "--profile"])
    assert without_times(plain / "run" / "metrics.jsonl") == without_times(profiled / "run" / "metrics.jsonl")
    assert not (plain / "run" / "trace.json.gz").exists() and not (plain / "run" / "profile.txt").exists()
    events = json.loads(gzip.decompress((profiled / "run" / "trace.json.gz").read_bytes()))["traceEvents"]
    named = [e["name"] for e in events if e.get("cat") == "user_annotation"]
    assert [named.count(f"phase/{phase}") for phase in PHASES] == [2, 2, 2, 2]  # the first of three warms up
    text = (profiled / "run" / "profile.txt").read_text(encoding="utf-8")
    tables = text.split("\n\n")
    assert [part.split(":")[0] for part in tables] == list(PHASES)
    assert all(0 < len(part.splitlines()) - 2 <= LISTED for part in tables)
    assert "linear" in tables[3].lower()  # products lead, whatever else the machine does


def test_a_single_iteration_is_recorded(tmp_path: Path):
    main(["train", runs.run_file(tmp_path, train={"total_steps": 1}), "--profile"])
    assert "update:" in (tmp_path / "run" / "profile.txt").read_text(encoding="utf-8")


def event(name: str, start: float, end: float, own: float = 0.0) -> SimpleNamespace:
    times = {
        "time_range": SimpleNamespace(start=start, end=end),
        "self_cpu_time_total": own,
        "self_device_time_total": 0,
    }
    return SimpleNamespace(name=name, device_type=DeviceType.CPU, **times)


def test_an_operator_counts_where_it_began_and_the_most_expensive_come_first():
    events = [event("phase/a", 0, 10), event("phase/b", 10.5, 20), event("phase/a", 30, 40)]
    events += [event("mm", 1, 2, 1000), event("mm", 31, 32, 2000), event("add", 3, 4, 500), event("mm", 15, 16, 700)]
    events += [event("outside", 25, 26, 9000)]
    events += [event(f"small{i}", 5, 6, 1) for i in range(20)]
    first, second = table(events).split("\n\n")
    lines = first.splitlines()
    assert lines[2].split() == ["3.000", "85.2%", "2", "mm"] and lines[3].split()[-1] == "add"
    assert len(lines) == 2 + LISTED
    assert second.splitlines()[2].split() == ["0.700", "100.0%", "1", "mm"]
    assert "outside" not in first + second


def on_host(number: int, name: str, start: float, end: float, noted: bool = False) -> FunctionEvent:
    return FunctionEvent(number, name, 1, start, end, use_device="cuda", is_user_annotation=noted)


def on_gpu(number: int, name: str, start: float, end: float, noted: bool = False) -> FunctionEvent:
    made = FunctionEvent(number, name, 7, start, end, use_device="cuda", is_user_annotation=noted)
    made.device_type = DeviceType.CUDA
    return made


def launch(host: list[FunctionEvent], operator: int, kernel: FunctionEvent, linked: bool) -> FunctionEvent:
    """As torch does: the time goes to all that has the operator's number and comes from no operator itself."""
    for event in (e for e in host if e.id == operator):
        event.append_kernel(kernel.name, 0, kernel.time_range.elapsed_us())
    vars(kernel).pop("linked_correlation_id", None)  # not in torch 2.11
    if linked:
        kernel.linked_correlation_id = operator
    return kernel


def from_a_gpu(linked: bool) -> EventList:
    """What torch makes of a rollout and an update: the GPU is still at the rollout when the host updates."""
    spans = [on_host(1, "phase/rollout", 0, 100, True), on_host(2, "phase/update", 100, 200, True)]
    spans += [on_host(3, "Optimizer.step#AdamW.step", 150, 190, True)]
    operators = [on_host(4, "aten::mm", 10, 20), on_host(5, "aten::mm", 110, 120), on_host(6, "aten::add", 160, 170)]
    graph = on_host(6, "cudaGraphLaunch", 30, 32)  # no operator's, and has the number of one
    calls = [on_host(n, "cudaLaunchKernel", at, at + 2) for n, at in [(101, 12), (102, 112), (103, 162)]]
    host, device = [*spans, *operators, graph], []
    for span, start, end in zip(spans, (50, 6050, 8050), (6050, 9050, 9050), strict=True):
        device.append(launch(host, span.id, on_gpu(span.id, span.name, start, end, True), linked))
    device.append(launch(host, 4, on_gpu(101, "gemm", 50, 2050), linked))
    device += [launch(host, 0, on_gpu(6, "decode", at, at + 2000), linked) for at in (2050, 4050)]
    device.append(launch(host, 5, on_gpu(102, "gemm", 6050, 8050), linked))
    device.append(launch(host, 6, on_gpu(103, "adam", 8050, 9050), linked))
    events = EventList([*host, *calls, *device], use_device="cuda")
    events._build_tree()
    return events


@pytest.mark.parametrize("linked", [True, False])
def test_a_kernel_counts_once_and_where_it_was_launched(linked: bool):
    rollout, update = (part.splitlines() for part in table(from_a_gpu(linked)).split("\n\n"))
    assert rollout[0] == "rollout: 6.000 ms of device time in operators"
    assert [line.split() for line in rollout[2:]] == [
        ["4.000", "66.7%", "2", "decode"],  # of a CUDA graph, which no operator launched
        ["2.000", "33.3%", "1", "aten::mm"],
    ]
    assert update[0] == "update: 3.000 ms of device time in operators"
    assert [line.split() for line in update[2:]] == [
        ["2.000", "66.7%", "1", "aten::mm"],
        ["1.000", "33.3%", "1", "aten::add"],
    ]


@pytest.mark.parametrize("value", ["yes", "2"])
def test_profile_takes_no_value(tmp_path: Path, value: str):
    with pytest.raises(SystemExit) as ended:
        main(["train", runs.run_file(tmp_path), f"--profile={value}"])
    assert ended.value.code == 2
