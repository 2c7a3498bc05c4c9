"""Every monitor finds the drift that is planted, says it once, and is silent without."""

import json
from pathlib import Path
from typing import Any

import pytest

import runs
from fastppo import WatchConfig, report, train
from fastppo.resume import LATEST
from fastppo.watch import CRITIC_STARTS, DriftError, Watch, quantities

HEALTHY = {
    "objective/kl": 2.0, "policy/kl_last": 0.01, "policy/clipfrac_avg": 0.1, "val/ratio_max": 2.0, "val/ess": 0.95,
    "objective/entropy": 50.0, "rollout/response_tokens": 50.0, "val/explained_variance": 0.3,
    "objective/score_length_correlation": -0.1,
}  # fmt: skip
DRIFTS = {  # monitor: the metrics of an iteration that drifted
    "kl": {"objective/kl": 90.0},
    "update_kl": {"policy/kl_last": 0.4},
    "clipfrac": {"policy/clipfrac_avg": 0.8},
    "ratio": {"val/ratio_max": 300.0},
    "ess": {"val/ess": 0.2},
    "entropy": {"objective/entropy": 1.0},
    "explained_variance": {"val/explained_variance": -4.0},
    "length_correlation": {"objective/score_length_correlation": -0.99},
}
SETTLED = CRITIC_STARTS + 5


def follow(watch: Watch, first: int, count: int, **metrics: float) -> list[str]:
    return [line for step in range(first, first + count) for line in watch.iteration(step, {**HEALTHY, **metrics})]


@pytest.mark.parametrize("monitor", DRIFTS)
def test_a_planted_drift_is_said_once_per_crossing(monitor: str) -> None:
    watch = Watch(WatchConfig(window=3))
    drifted: Any = {**HEALTHY, **DRIFTS[monitor]}
    assert follow(watch, 1, SETTLED) == [] and set(watch.metrics().values()) == {0.0}
    said = follow(watch, SETTLED + 1, 10, **drifted)
    assert len(said) == 1 and said[0].startswith(f"watch: {monitor}: ")
    assert {name for name, on in watch.metrics().items() if on} == {f"watch/{monitor}"}
    assert follow(watch, SETTLED + 11, 10) == [] and not any(watch.metrics().values())
    assert len(follow(watch, SETTLED + 21, 10, **drifted)) == 1


@pytest.mark.parametrize("monitor", DRIFTS)
def test_a_nan_in_the_first_iteration_blinds_no_monitor(monitor: str) -> None:
    watch, nothing = Watch(WatchConfig(window=3)), dict.fromkeys(DRIFTS[monitor], float("nan"))
    assert follow(watch, 1, 1, **nothing) == [] == follow(watch, 2, SETTLED)
    assert len(follow(watch, SETTLED + 2, 10, **DRIFTS[monitor])) == 1


def test_every_monitor_is_tested_and_can_be_switched_off() -> None:
    assert {*DRIFTS} == {*quantities(WatchConfig())}
    names = [f for f in WatchConfig.__dataclass_fields__ if f.startswith(("max_", "min_"))]
    off = Watch(WatchConfig(window=1, **dict.fromkeys(names)))  # pyright: ignore
    assert [line for drift in DRIFTS.values() for line in follow(off, 50, 3, **drift)] == [] and off.metrics() == {}


def test_a_quantity_that_wavers_about_its_threshold_is_said_once() -> None:
    watch = Watch(WatchConfig(window=3, max_kl=10.0))
    said = [follow(watch, step, 1, **{"objective/kl": 10.0 + (-1.0) ** step}) for step in range(1, 40)]
    assert sum(map(len, said)) == 1 and watch.metrics()["watch/kl"] == 1.0


def test_one_odd_iteration_is_no_drift() -> None:
    watch = Watch(WatchConfig(window=5, max_kl=10.0))
    assert follow(watch, 1, 10) == [] and follow(watch, 11, 1, **{"objective/kl": 30.0}) == []
    assert follow(watch, 12, 1, **{"objective/kl": float("nan")}) == []


def test_a_judge_that_falls_while_the_score_rises_is_said() -> None:
    """Reward hacking: not when both fall, nor when both rise."""

    def said(*pairs: tuple[float, float]) -> int:
        watch = Watch(WatchConfig(judge="outside", judge_drop=0.05))
        return sum(len(watch.evaluation({"eval/scores": s, "eval/reward/outside": j})) for s, j in pairs)

    assert said((0.1, 0.5), (0.3, 0.6), (0.5, 0.4), (0.6, 0.3)) == 1
    assert said((0.1, 0.5), (0.3, 0.6), (0.5, 0.7)) == said((0.5, 0.6), (0.3, 0.4), (0.1, 0.2)) == 0
    assert said((0.1, 0.5), (0.3, 0.46)) == 0  # less than judge_drop


def test_what_is_remembered_goes_through_a_checkpoint() -> None:
    config = WatchConfig(window=3, judge="outside")
    one = Watch(config)
    follow(one, 1, 8, **DRIFTS["kl"])
    one.evaluation({"eval/scores": 0.1, "eval/reward/outside": 0.5})
    state = json.loads(json.dumps(one.state()))
    other = Watch(config)
    other.load(state)
    for watch in (one, other):
        assert follow(watch, 9, 3, **DRIFTS["ess"])[0].startswith("watch: ess")
        assert watch.evaluation({"eval/scores": 0.2, "eval/reward/outside": 0.4})[0].startswith("watch: judge")
    assert one.state() == other.state() and one.metrics() == other.metrics()


def test_a_run_says_logs_and_sums_up_its_drift(tmp_path: Path, capsys: Any) -> None:
    config = runs.config(tmp_path, watch={"window": 1, "max_ratio": 1e-6}, train={"total_steps": 4, "eval_every": 9})
    folder = train(config)
    report.summary(folder)
    said = capsys.readouterr().out
    assert said.count("watch: ratio: val/ratio_max is ") == 1
    assert "watch: ratio crossed its threshold once, first in iteration 1, and is beyond it at the end\n" in said
    rows = [row for row in runs.rows(folder / "metrics.jsonl") if "episode" in row]
    assert [row["watch/ratio"] for row in rows] == [1.0] * 4 and rows[-1]["watch/kl"] == 0.0


def test_a_monitor_may_end_the_run_which_goes_on_when_told_to(tmp_path: Path) -> None:
    config = runs.config(tmp_path, watch={"window": 2, "max_ratio": 1e-6, "stop": ["ratio"]}, train={"total_steps": 4})
    with pytest.raises(DriftError, match="watch.stop: ratio crossed; --resume goes on from here in spite of it"):
        train(config)
    rows = runs.rows(train(config, resume=LATEST) / "metrics.jsonl")
    assert [row["step"] for row in rows if "episode" in row] == [1, 2, 3, 4]


def longest_digits(samples: Any) -> list[float]:
    return [float(len(s.response_ids)) for s in samples]


def test_a_score_that_is_the_length_is_found(tmp_path: Path) -> None:
    """Through the engine: the correlation is 1, and 0 where nothing varies."""
    from batches import engine, trajectories

    made = engine()
    rollout = trajectories()
    lengths = rollout.action_counts.double()
    metrics = made.score(rollout, lengths.float()).metrics
    assert metrics["objective/score_length_correlation"] == pytest.approx(1.0)
    assert made.score(rollout, [3.0] * 8).metrics["objective/score_length_correlation"] == 0.0


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"watch": {"judge": "nobody"}}, "watch.judge must be the name of a reward, one of ['digits'], got 'nobody'"),
        ({"watch": {"stop": ["judge"]}}, "watch.stop has 'judge', so watch.judge must be set"),
        ({"watch": {"min_explained_variance": 1.0}}, "watch.min_explained_variance must be < 1 and finite, got 1.0"),
        ({"watch": {"window": 0}}, "watch.window must be > 0 and finite, got 0"),
        ({"train": {"keep_best": True}, "data": {"eval_prompts": None}}, "train.keep_best goes by eval/scores"),
        ({"seed": -1}, "seed must be in [0, 2**62), got -1"),
    ],
)
def test_what_cannot_be_watched_is_refused(changes: Any, fragment: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        runs.config(tmp_path, **changes)
    assert fragment in str(error.value)
