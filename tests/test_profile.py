"""`fastppo train --profile`: the trace and its table are there, name every phase, and change nothing."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

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
    assert "optimizer" in tables[3].lower() or "adam" in tables[3].lower()


def test_a_single_iteration_is_recorded(tmp_path: Path):
    main(["train", runs.run_file(tmp_path, train={"total_steps": 1}), "--profile"])
    assert "update:" in (tmp_path / "run" / "profile.txt").read_text(encoding="utf-8")


def event(name: str, start: float, end: float, own: float = 0.0) -> SimpleNamespace:
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), self_cpu_time_total=own)


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


@pytest.mark.parametrize("value", ["yes", "2"])
def test_profile_takes_no_value(tmp_path: Path, value: str):
    with pytest.raises(SystemExit) as ended:
        main(["train", runs.run_file(tmp_path), f"--profile={value}"])
    assert ended.value.code == 2
