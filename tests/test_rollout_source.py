"""One step off: what is sampled ahead is one update old, known as such, corrected, and neither lost nor repeated."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import runs
from fastppo import RewardError, RunConfig, train
from fastppo.checks import RolloutError
from fastppo.rollout import vllm
from fastppo.trainer import start
from vllm_protocol import Server, vllm_server_fixture  # noqa: F401

Serve = Callable[..., Server]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(vllm, "BACKOFF_S", 0.01)
    runs.calls.clear()
    yield


def config(folder: Path, server: Server, *, ahead: bool = True, **changes: Any) -> RunConfig:
    servers = {"servers": [server.url], "folder": str(folder), "retries": 1, "wait_s": 5.0}
    rollout = {"engine": "vllm", "one_step_off": ahead, "vllm": servers}
    return runs.config(
        folder,
        **{
            "rollout": rollout,
            "ppo": {"importance_cap": 2.0},
            "train": {"total_steps": 4, "eval_every": 3},
            "policy_optimizer": {"lr": 1e-2},
            **changes,
        },
    )


def iterations(folder: Path) -> list[dict[str, Any]]:
    return [row for row in runs.rows(folder / "metrics.jsonl") if "episode" in row]


def trained_on() -> list[list[str]]:
    """Answers of the records of each training batch."""
    return [[s.record["answer"] for s in samples] for samples in runs.calls if len(samples) == 4]


def test_each_rollout_but_the_first_is_one_update_old(vllm_server: Serve, tmp_path: Path) -> None:
    server = vllm_server()
    rows = iterations(train(config(tmp_path / "ahead", server)))
    assert [row["rollout/staleness"] for row in rows] == [0.0, 1.0, 1.0, 1.0]
    assert all(row["rollout/sync_gap_max"] <= 1e-5 for row in rows)
    assert rows[0]["rollout/logprob_gap_max"] <= 1e-5 < 1e-3 < min(r["rollout/logprob_gap_max"] for r in rows[1:])
    assert all(row["rollout/importance_weight_mean"] != 1.0 for row in rows[1:])
    assert all(row["val/ratio_max_first"] == 1.0 for row in rows)  # old log-probs are the policy's own
    probes, evaluations = 3 * 4, 3 * runs.NUM_PROMPTS
    assert len(server.asked) == 4 * 4 + probes + evaluations  # nothing is sampled for a fifth iteration
    ahead = trained_on()
    runs.calls.clear()
    rows = iterations(train(config(tmp_path / "plain", vllm_server(), ahead=False)))
    assert [row["rollout/staleness"] for row in rows] == [0.0] * 4 and trained_on() == ahead


def test_it_goes_on_with_the_prompts_it_had_drawn(vllm_server: Serve, tmp_path: Path, capsys: Any) -> None:
    """A stop loses the rollout that ran ahead, not its prompts; the next one is fresh, and the run says so."""
    server = vllm_server()
    train(config(tmp_path / "whole", server))
    whole = trained_on()
    runs.calls.clear()
    fails = [{"kind": "function", "target": "runs:fails_in_the_third_iteration"}]
    evaluations = {"total_steps": 4, "eval_every": 2}
    with pytest.raises(RewardError):
        train(config(tmp_path, server, rewards=fails, train=evaluations))
    runs.calls.clear()
    runs.calls.extend([[]] * 5)  # past the call that fails
    folder = train(config(tmp_path, server, rewards=fails, train=evaluations), resume="latest")
    rows = iterations(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["rollout/staleness"] for row in rows] == [0.0, 1.0, 0.0, 1.0]
    assert trained_on() == whole[2:]
    assert "the first rollout comes from the policy as it is: not bit for bit" in capsys.readouterr().out


def test_weights_that_do_not_arrive_ahead_stop_the_run(vllm_server: Serve, tmp_path: Path) -> None:
    """Log-probs of an older policy are expected to differ, so the servers are probed before the policy moves on."""
    server = vllm_server()
    update = server._update_weights

    def loads_once(_: Any, body: dict[str, Any]) -> Any:
        update(_, body)
        server.loads = False

    server._update_weights = loads_once
    with pytest.raises(RolloutError, match="it has old weights or a part of them"):
        train(config(tmp_path, server))
    assert len(iterations(tmp_path / "run")) == 1


def test_a_failure_ahead_ends_the_run(vllm_server: Serve, tmp_path: Path) -> None:
    server = vllm_server()
    generate = server.generate
    server.generate = lambda body: generate(body) if len(server.asked) < 20 else (400, {"error": "no more"})
    with pytest.raises(RolloutError, match="no more"):
        train(config(tmp_path, server, train={"total_steps": 9, "eval_every": 100}))
    assert 1 <= len(iterations(tmp_path / "run")) < 9


def test_the_end_of_a_run_does_not_wait_for_what_runs_ahead(vllm_server: Serve, tmp_path: Path) -> None:
    server, release = vllm_server(), threading.Event()
    run = start(config(tmp_path, server), None)
    next(run.rollouts)
    run.rollouts._pending.result(30)  # pyright: ignore[reportOptionalMemberAccess]
    generate = server.generate
    server.generate = lambda body: generate(body) if release.wait(30) else (500, {})
    run.rollouts._pending = run.rollouts._begin(run.rollouts._draw_ahead())
    begun = time.monotonic()
    run.close()
    with pytest.raises(RolloutError):
        run.rollouts._pending.result(20)
    assert time.monotonic() - begun < 20
    release.set()
