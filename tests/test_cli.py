"""The `fastppo` command: overrides reach the run, help names every key, and bad input ends with one line and a code."""

import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import runs
from fastppo import load_config
from fastppo.cli import main, parse_run
from fastppo.run_file import to_dict

TWO_REWARDS = [{"kind": "function", "target": "runs:digits"}, {"kind": "http", "target": "http://localhost:1/x"}]


def command(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The installed script, as a shell would start it."""
    script = str(Path(sys.executable).with_name("fastppo"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([script, *args], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def failure(args: Sequence[str], capsys: Any) -> tuple[int, str]:
    """Exit code and stderr; boxes are undone, so that a sentence stands in one line."""
    with pytest.raises(SystemExit) as ended:
        main(args)
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert isinstance(ended.value.code, int)
    return ended.value.code, re.sub(r"[\s│╭╮╰╯─]+", " ", err)


def flat(value: Any, where: str = "") -> dict[str, Any]:
    """Nested tables -> one value per dotted key."""
    if isinstance(value, tuple) and any(isinstance(v, dict) for v in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {where: value}
    return {k: v for name, inner in value.items() for k, v in flat(inner, f"{where}.{name}".lstrip(".")).items()}


def test_overrides_change_their_keys_and_nothing_else(tmp_path: Path) -> None:
    path = runs.run_file(tmp_path, rewards=TWO_REWARDS)
    overrides = {
        "rewards.1.weight": 2.0,
        "rewards.0.name": "sevens",
        "ppo.kl_coef": 0.125,
        "ppo.value_clip": None,
        "ppo.whiten_advantages": False,
        "rollout.num_prompts": 16,
        "rollout.stop_token_ids": (3, 5),
        "policy_optimizer.betas": (0.5, 0.75),
        "policy.dtype": "bfloat16",
        "train.loggers": ("tensorboard",),
        "out": "elsewhere",
        "seed": 9,
    }
    args: list[str] = []
    for key, value in overrides.items():
        flag = f"--{key.replace('_', '-')}" if len(args) % 2 else f"--{key}"  # both spellings
        items = value if isinstance(value, tuple) else (value,)
        args += [flag.replace(".whiten", ".no-whiten")] if value is False else [flag, *map(str, items)]
    before, after = flat(to_dict(load_config(path))), flat(to_dict(parse_run(path, args)))
    assert after == before | overrides


def test_help_of_a_run_lists_every_key(tmp_path: Path, capsys: Any) -> None:
    path = runs.run_file(tmp_path, rewards=TWO_REWARDS)
    with pytest.raises(SystemExit) as ended:
        main(["train", path, "--help"])
    assert ended.value.code == 0
    text = re.sub(r"[\s│╭╮╰╯─]+", " ", capsys.readouterr().out)
    for key in flat(to_dict(load_config(path))):
        assert f"--{key.replace('_', '-')}" in text
    assert "The ratio is clipped at 1 - clip_low. (default: 0.2)" in text
    assert "Local folder or hub name; no default" in text


@pytest.mark.parametrize(
    ("args", "fragments"),
    [
        (["--help"], ["train", "demo", "doctor"]),
        (["train", "--help"], ["the run file", "RUN.toml --help"]),
        (["demo", "--help"], ["--out", "--seed"]),
    ],
    ids=" ".join,
)
def test_help_works_without_a_run_file(args: list[str], fragments: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main(args)
    text = capsys.readouterr().out
    assert ended.value.code == 0 and all(f in text for f in fragments)


def test_doctor_says_what_runs_here(capsys: Any) -> None:
    main(["doctor"])
    text = capsys.readouterr().out
    for row in ("torch", "transformers", "flash-attn", "attention, float32", "native", "sdpa", "gae", "cpu threads"):
        assert row in text
    assert "missing" not in text  # the C++ library is there
    assert text.count("CPU, float32") == 1  # a reason is said once


@pytest.mark.parametrize(
    ("args", "fragment"),
    [
        (["--ppo.gamma", "high"], "--ppo.gamma: could not convert string to float: 'high'"),
        (["--ppo.num-epochs", "2.5"], "--ppo.num-epochs: invalid literal for int() with base 10: '2.5'"),
        (["--ppo.advantage", "gea"], "invalid choice 'gea' for argument '--ppo.advantage'. Expected one of ('gae',"),
        (["--ppo.gamma"], "--ppo.gamma"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_bad_override_is_one_message_and_code_2(args: list[str], fragment: str, tmp_path: Path, capsys: Any) -> None:
    code, err = failure(["train", runs.run_file(tmp_path), *args], capsys)
    assert code == 2 and fragment in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "wrong", "right"),
    [
        ("train", ["--rezume"], "--resume"),
        ("train", ["--profil"], "--profile"),
        ("train", ["--ppo.kl-coeff", "1"], "--ppo.kl-coef"),
        ("train", ["--ppo.kl_coeff=1"], "--ppo.kl-coef"),
        ("train", ["--seed", "2", "--rewards.7.weight", "1"], "--rewards.0.weight"),
        ("train", ["--ppo.no-whiten-advantage"], "--ppo.no-whiten-advantages"),
        ("plan", ["--jsn", "--sed", "1"], "--json"),
        ("plan", ["--gpuu", "24GB"], "--gpu"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_an_unknown_option_names_the_nearest_one(
    command: str, wrong: list[str], right: str, tmp_path: Path, capsys: Any
) -> None:
    code, err = failure([command, runs.run_file(tmp_path), *wrong], capsys)
    given = next(arg for arg in wrong if arg != "--seed" and arg.startswith("--")).partition("=")[0]
    assert (code, err) == (2, f"fastppo: unknown option {given}; did you mean {right}? ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("wrong", "said"), [("--gpu", "option --gpu"), ("seed", "argument seed")])
def test_what_resembles_no_option_points_to_the_help(wrong: str, said: str, tmp_path: Path, capsys: Any) -> None:
    _, err = failure(["train", runs.run_file(tmp_path), wrong], capsys)
    assert err == f"fastppo: unknown {said}; `fastppo train RUN.toml --help` lists all options "


REFUSED: list[dict[str, dict[str, Any]]] = [
    {"ppo": {"gamma": 2.0}},
    {"ppo": {"num_minibatches": 3}},
    {"ppo": {"advantage": "grpo"}},
    {"ppo": {"importance_cap": 2.0}, "rollout": {"old_logprobs": "sampler"}},
    {"critic": {"init": "reward"}},
    {"policy_optimizer": {"lr": -1.0}},
]


@pytest.mark.parametrize("changes", REFUSED, ids=str)
def test_values_are_refused_in_the_words_of_the_file(changes: Any, tmp_path: Path, capsys: Any) -> None:
    """One line, whether a value is illegal or the values are so together."""
    said = []
    for in_file, args in ((changes, []), ({}, [f"--{t}.{k}={v}" for t in changes for k, v in changes[t].items()])):
        written = runs.run_file(tmp_path, **in_file)
        capsys.readouterr()  # what saving the model says
        with pytest.raises(SystemExit) as ended:
            main(["train", written, *args])
        assert ended.value.code == 2
        said.append(capsys.readouterr().err)
    assert said[0] == said[1] and said[0].startswith("fastppo: ") and said[0].count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"policy": {"path": "./nowhere"}}, "there is no folder './nowhere'"),
        (
            {"policy": {"path": "no/where"}},
            "cannot load 'no/where': it is not a local folder, and HF_HUB_OFFLINE is set",
        ),
        ({"policy": {"pth": "x"}}, "unknown key 'policy.pth'; did you mean 'policy.path'?"),
        ({"data": {"prompts": "nowhere.jsonl"}}, "cannot read the prompts at 'nowhere.jsonl'"),
        ({"rewards": [{"kind": "function", "target": "runs:nothing"}]}, "cannot import 'runs:nothing'"),
        ({"out": __file__}, f"cannot write to the run folder {__file__!r}: File exists"),
        ({"rollout": {"max_new_tokens": 126}}, "make 130 tokens, more than the model's context of 128"),
    ],
)
def test_bad_input_is_one_line_and_code_2(changes: Any, fragment: str, tmp_path: Path, capsys: Any) -> None:
    path = runs.run_file(tmp_path, **changes)
    with pytest.raises(SystemExit) as ended:
        main(["train", path])
    err = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert len(err) == 1 and err[0].startswith("fastppo: ") and fragment in err[0]
    assert not (tmp_path / "run").exists()  # what was refused leaves nothing behind


def test_no_run_file_is_code_2(tmp_path: Path, capsys: Any) -> None:
    assert failure(["train", str(tmp_path / "no.toml")], capsys) == (
        2,
        f"fastppo: cannot read the run file '{tmp_path}/no.toml': No such file or directory ",
    )
    for args in (["train"], ["train", "--ppo.gamma", "1"]):
        code, err = failure(args, capsys)
        assert code == 2 and err.startswith(
            "fastppo: train needs a run file, before any option: fastppo train RUN.toml"
        )
    for args in ([], ["trian"]):
        assert failure(args, capsys)[0] == 2


def test_the_version_is_that_of_the_package(capsys: Any) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"fastppo {importlib.metadata.version('fastppo')}\n"


def test_a_reward_that_fails_is_one_line_and_code_1(tmp_path: Path, capsys: Any) -> None:
    path = runs.run_file(tmp_path, rewards=[{"kind": "function", "target": "runs:always_fails", "name": "judge"}])
    code, err = failure(["train", path], capsys)
    said = f"fastppo: reward 'judge' raised KeyError: 'no answer' ({runs.__file__}, line "
    assert code == 1 and err.startswith(said) and err.endswith(': raise KeyError("no answer")) ')


def test_the_script_trains_with_a_reward_of_the_folder_it_is_started_in(tmp_path: Path) -> None:
    """As `python -m fastppo` does; and what it prints is the run, not the loading of weights."""
    source = "def score(samples):\n    return [float(len(s.response)) for s in samples]\n"
    (tmp_path / "my_rewards.py").write_text(source)
    path = runs.run_file(tmp_path, rewards=[{"kind": "function", "target": "my_rewards:score", "name": "characters"}])
    done = command("train", path, "--train.total-steps", "1", "--out", "mine", cwd=tmp_path)
    assert (done.returncode, runs.own(done.stderr)) == (0, "")
    before, step, after = runs.rows(tmp_path / "mine" / "metrics.jsonl")
    assert "reward/characters" in step
    planned, named, line, *end = done.stdout.splitlines()
    assert planned.startswith("memory: at most ") and named == "runs foreign code: my_rewards:score"
    assert line.startswith("ppo 1/1  reward ")
    scores = f"{before['eval/scores']:.3f} (iteration 0) -> {after['eval/scores']:.3f} (iteration 1)"
    assert end == [f"held-out score: {scores}", "run folder: mine"]
