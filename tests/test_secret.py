"""No secret reaches the log or the run folder, and nothing runs foreign code without saying so."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

import runs
from endpoint import serve_fixture  # noqa: F401
from fastppo import HTTPReward, RewardConfig, RewardError, Sample, load_config, train
from fastppo.resume import LATEST
from fastppo.secret import redacted, request_parts

SAMPLE = Sample(prompt="", response="", prompt_ids=[1], response_ids=[2], finish_reason="stop")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://judge:80/score", "http://judge:80/score"),
        ("https://me:pass@judge/score", "https://***:***@judge/score"),
        ("https://token@judge/score", "https://***@judge/score"),
        ("http://judge/score?token=abc&n=&flag#x", "http://judge/score?token=***&n=&***#x"),
        ("http://${ME}:${PASS}@judge/?token=${T}", "http://${ME}:${PASS}@judge/?token=${T}"),
        ("http://[judge?token=abc", "http://***"),
        ("runs:digits", "runs:digits"),
    ],
)
def test_what_is_written_down_of_a_url(url: str, shown: str) -> None:
    assert redacted(url) == shown == redacted(shown)


def test_the_environment_fills_a_url_and_passwords_become_a_header(monkeypatch: Any) -> None:
    monkeypatch.setenv("PASS", "s:e/c")
    monkeypatch.setenv("T", "abc")
    url, headers = request_parts("http://me:${PASS}@judge:8/score?token=${T}")
    assert url == "http://judge:8/score?token=abc"
    assert base64.b64decode(headers["Authorization"].removeprefix("Basic ")).decode() == "me:s:e/c"
    with pytest.raises(ValueError, match="rewards.target needs NOT_THERE in the environment, which is not set"):
        HTTPReward("http://judge/?token=${NOT_THERE}")


def test_a_run_writes_no_secret_down(serve: Any, tmp_path: Path, capsys: Any) -> None:
    """Neither in the folder nor in what it prints, and it resumes; its config.json alone does not start another one."""
    secret = "hunter2secret"
    server = serve(lambda samples: {"scores": [1.0] * len(samples)})
    url = server.url.replace("http://", f"http://me:{secret}@") + f"?token={secret}"
    config = runs.config(tmp_path, rewards=[{"kind": "http", "target": url}], train={"save_every": 1, "eval_every": 9})
    folder = train(config)
    train(config, resume=LATEST)
    server.replies[:] = [500]
    with pytest.raises(RewardError) as error:
        HTTPReward(url, retries=0)([SAMPLE])
    assert "***:***@" in str(error.value)
    said = "".join(capsys.readouterr()) + str(error.value)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10 and secret not in said
    assert [path for path in files if secret.encode() in path.read_bytes()] == []
    with pytest.raises(ValueError, match=r"is what a run wrote down of a URL with a secret: give the URL itself"):
        load_config(folder / "config.json")
    names = {RewardConfig(kind="http", target=t).log_name for t in (url, f"http://{secret}@judge")}
    assert not any(secret in name for name in names)


def test_foreign_code_is_named(tmp_path: Path, capsys: Any) -> None:
    train(runs.config(tmp_path, train={"total_steps": 1}))
    assert "runs foreign code: runs:digits" in capsys.readouterr().out.splitlines()


def test_a_checkpoint_cannot_bring_code(tmp_path: Path) -> None:
    """A config.json that names a module in its folder is refused while trust_remote_code is off."""
    config = runs.config(tmp_path, train={"total_steps": 1})
    planted = Path(config.policy.path)
    facts = json.loads((planted / "config.json").read_text())
    facts |= {"model_type": "planted", "auto_map": {"AutoConfig": "planted.C", "AutoModelForCausalLM": "planted.M"}}
    (planted / "config.json").write_text(json.dumps(facts))
    (planted / "planted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: ...\nclass M: ...\n")
    with pytest.raises(ValueError, match="cannot (load|read the config of)"):
        train(config)
    assert not (tmp_path / "ran").exists()
