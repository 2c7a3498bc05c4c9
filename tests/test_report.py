"""What a person sees while a run goes on: numbers that mean something, and what takes so long."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastppo import report
from fastppo.metrics import PhaseTimer

Wait = Callable[[float], None]


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Wait:
    """Lets seconds pass."""
    now = [0.0]
    monkeypatch.setattr(report, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def passed(seconds: float) -> None:
        now[0] += seconds

    return passed


def test_what_rounds_to_zero_has_no_sign(capsys: Any) -> None:
    with report.progress(1) as show:
        show({"objective/scores": -0.0001, "objective/kl": -0.004})
    assert capsys.readouterr().out == "ppo 1/1  reward 0.000  kl 0.00\n"


def test_a_slow_step_says_which_phase_runs(capsys: Any, wait: Wait) -> None:
    with report.progress(2) as show:
        for seconds in (5, 30):
            timer = PhaseTimer(show.phase)
            for name in ("rollout", "reward", "update"):
                with timer(name):
                    wait(seconds)
            show({"objective/scores": 1.0})
    lines = ["1/2  reward 1.000", "1/2  reward ...", "1/2  update ...", "2/2  reward 1.000"]
    assert capsys.readouterr().out.splitlines() == [f"ppo {line}" for line in lines]


def test_the_longest_silence_is_short_for_many_steps(capsys: Any, wait: Wait) -> None:
    with report.progress(10000) as show:
        for _ in range(100):
            show.phase("rollout")
            wait(1)
            show({"objective/scores": 1.0})
    done = [int(line.split()[1].split("/")[0]) for line in capsys.readouterr().out.splitlines()]
    assert done == [1, 21, 41, 61, 81]


def test_the_phase_in_the_bar_counts_its_seconds(wait: Wait) -> None:
    phase = report.Phase("update")
    assert str(phase) == ""  # short ones would only flicker
    wait(75)
    assert str(phase) == "update 75 s"


def test_a_quiet_rank_prints_nothing(capsys: Any, wait: Wait) -> None:
    with report.progress(1, quiet=True) as show:
        wait(100)
        show.phase("rollout")
        show({"objective/scores": 1.0})
    assert "".join(capsys.readouterr()) == ""


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(0, 0.5), (2, 0.25), (4, -0.0001)], "held-out score: 0.500 (iteration 0) -> 0.000 (iteration 4)\n"),
        ([(0, 0.5)], "held-out score: 0.500 (iteration 0)\n"),
        ([], ""),
    ],
)
def test_the_end_of_a_run_compares_its_evaluations(rows: Any, expected: str, tmp_path: Path, capsys: Any) -> None:
    lines = [{"step": 1, "episode": 4}, *({"step": step, "eval/scores": score} for step, score in rows)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report.summary(tmp_path)
    assert capsys.readouterr().out == f"{expected}run folder: {tmp_path}\n"


def test_a_title_wider_than_its_table_stays_one_line(capsys: Any) -> None:
    report.table("a title of many words over a narrow table", ("a", "b"), [(1, 2)])
    assert capsys.readouterr().out.splitlines()[0] == "a title of many words over a narrow table"
