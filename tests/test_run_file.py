"""A run file says what is run: nothing in it is ignored, and what is wrong in it is one sentence with the way out."""

import ast
import dataclasses
import inspect
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import runs
from fastppo import (
    RunConfig,
    config,
    config_inputs,
    config_layers,
    config_memory,
    config_optimizer,
    config_ppo,
    config_vllm,
    config_watch,
    load_config,
)
from fastppo.run_file import from_dict, to_dict

MINIMAL: dict[str, Any] = {
    "policy": {"path": "p"},
    "data": {"prompts": "d.jsonl"},
    "rewards": [{"kind": "function", "target": "m:f"}],
}
FULL: dict[str, Any] = {
    "policy": {"path": "p", "reference": "r", "dtype": "bfloat16"},
    "data": {"prompts": "d.jsonl", "eval_prompts": "e.jsonl", "template": "Q: {prompt}", "skip_long": True},
    "rewards": [
        {"kind": "model", "target": "a/rm", "label": 1, "weight": -0.5},
        {"kind": "http", "target": "http://localhost:8000/score", "retries": 0, "timeout_s": 2},
    ],
    "critic": {"init": "reward"},
    "layers": {"checkpointing": "full", "checkpoint_every": 2},
    "rollout": {"num_prompts": 8, "samples_per_prompt": 2, "stop_token_ids": [3, 4], "temperature": 1},
    "ppo": {"num_minibatches": 4, "value_clip": "none", "advantage": "rloo", "dual_clip": 3, "target_kl": 0.1},
    "policy_optimizer": {"betas": [0.8, 0.9], "max_grad_norm": "none"},
    "train": {"total_steps": 5, "loggers": ["tensorboard"]},
    "seed": 7,
}


def changed(**tables: Any) -> dict[str, Any]:
    """MINIMAL with tables replaced key by key."""
    return runs.merged(MINIMAL, tables)


def fields(cls: type, where: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and default of every key, at every depth."""
    for field in dataclasses.fields(cls):
        nested = field.default_factory
        if isinstance(nested, type) and dataclasses.is_dataclass(nested):
            yield from fields(nested, f"{where}{field.name}.")
        else:
            yield f"{where}{field.name}", field.default


@pytest.mark.parametrize("tables", [MINIMAL, FULL], ids=["minimal", "full"])
def test_config_to_tables_and_back_is_the_identity(tables: dict[str, Any]) -> None:
    config = from_dict(RunConfig, tables)
    through_json = json.loads(json.dumps(to_dict(config)))
    again = from_dict(RunConfig, through_json)
    assert again == config and hash(again) == hash(config)
    assert json.loads(json.dumps(to_dict(again))) == through_json


def test_every_key_of_a_file_arrives(tmp_path: Path) -> None:
    """CORRECTNESS D15: in the place it was written for, and nothing else moves."""
    path = tmp_path / "run.toml"
    path.write_text(runs.toml(FULL), encoding="utf-8")
    made, default = to_dict(load_config(path)), to_dict(from_dict(RunConfig, MINIMAL))
    for section in ("policy", "data", "critic", "rollout", "ppo", "policy_optimizer", "critic_optimizer", "train"):
        given = FULL.get(section, {})
        for key, value in made[section].items():
            expected = given.get(key, default[section][key])
            expected = None if expected == "none" else tuple(expected) if isinstance(expected, list) else expected
            assert value == expected, f"{section}.{key}"
    assert [(r["kind"], r["weight"], r["retries"]) for r in made["rewards"]] == [("model", -0.5, 3), ("http", 1.0, 0)]
    assert made["seed"] == 7 and made["out"] == default["out"]


def test_every_key_has_a_line_of_help() -> None:
    """A string below the field, which `fastppo train RUN.toml --help` prints."""
    silent = [
        f"{cls.name}.{key.target.id}"
        for module in (
            config,
            config_inputs,
            config_layers,
            config_memory,
            config_optimizer,
            config_ppo,
            config_vllm,
            config_watch,
        )
        for cls in ast.parse(inspect.getsource(module)).body
        if isinstance(cls, ast.ClassDef)
        for key, after in itertools.pairwise([*cls.body, ast.Pass()])
        if isinstance(key, ast.AnnAssign) and isinstance(key.target, ast.Name)
        if not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant))
    ]
    values = ("out", "seed", "device", "deterministic")
    tables = [field.name for field in dataclasses.fields(RunConfig) if field.name not in values]
    assert silent == [f"RunConfig.{name}" for name in tables]  # whose help is their class's


SECTIONS = (
    "policy",
    "data",
    "critic",
    "rollout",
    "ppo",
    "policy_optimizer",
    "critic_optimizer",
    "memory",
    "layers",
    "train",
)
NEAREST = [("", "sed", "seed"), ("rewards[0].", "wieght", "weight"), ("ppo.", "kl_coeff", "kl_coef")] + [
    (f"{s}.", key[:-1] + "_", key) for s in SECTIONS for key in (list(to_dict(from_dict(RunConfig, MINIMAL))[s])[-1],)
]


@pytest.mark.parametrize(("where", "wrong", "right"), NEAREST, ids=lambda x: x or "top")
def test_unknown_key_names_the_nearest_legal_one(where: str, wrong: str, right: str) -> None:
    """CORRECTNESS D15: at every depth."""
    if where == "rewards[0].":
        tables = changed(rewards=[{**MINIMAL["rewards"][0], wrong: 1}])
    else:
        tables = changed(**({where[:-1]: {wrong: 1}} if where else {wrong: 1}))
    with pytest.raises(ValueError, match=re.escape(f"unknown key '{where}{wrong}'; did you mean '{where}{right}'?")):
        from_dict(RunConfig, tables)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "text for a number": (changed(ppo={"gamma": "high"}), "ppo.gamma must be of type float, got 'high'"),
    "float for int": (changed(rollout={"num_prompts": 2.5}), "rollout.num_prompts must be of type int, got 2.5"),
    "bool for int": (changed(ppo={"num_epochs": True}), "ppo.num_epochs must be of type int, got True"),
    "bool for float": (changed(ppo={"lam": False}), "ppo.lam must be of type float, got False"),
    "int for bool": (changed(data={"chat": 1}), "data.chat must be of type bool, got 1"),
    "number for text": (changed(policy={"path": 3}), "policy.path must be of type str, got 3"),
    "table for text": (changed(out={"dir": "x"}), "out must be of type str, got {'dir': 'x'}"),
    "text for a table": (changed(ppo="fast"), "ppo must be a table, got 'fast'"),
    "table for a list of tables": (changed(rewards={"kind": "http"}), "rewards must be a list (in TOML: [[rewards]])"),
    "text for a list": (changed(rollout={"stop_token_ids": "3"}), "rollout.stop_token_ids must be a list, got '3'"),
    "wrong item": (changed(rollout={"stop_token_ids": [1, "x"]}), "stop_token_ids[1] must be of type int, got 'x'"),
    "wrong length": (changed(policy_optimizer={"betas": [0.9]}), "policy_optimizer.betas must have 2 entries, got 1"),
    "unknown literal": (
        changed(ppo={"advantage": "gea"}),
        "must be one of ['gae', 'grpo', 'dr_grpo', 'rloo', 'reinforce++'], got 'gea'; did you mean 'gae'?",
    ),
    "unknown literal in a list": (changed(train={"loggers": ["wandbb"]}), "did you mean 'wandb'?"),
    "missing table": ({k: v for k, v in MINIMAL.items() if k != "data"}, "missing key 'data': it has no default"),
    "missing key": (changed(rewards=[{"kind": "http"}]), "missing key 'rewards[0].target': it has no default"),
    "no rewards": (changed(rewards=[]), "give at least one [[rewards]] table"),
    "minibatches": (
        changed(rollout={"num_prompts": 8}, ppo={"num_minibatches": 5}),
        "ppo.num_minibatches (5) must divide the sequences of a rollout (8 = rollout.num_prompts * "
        "rollout.samples_per_prompt); the nearest smaller divisor is 4",
    ),
    "too many minibatches": (changed(rollout={"num_prompts": 2}, ppo={"num_minibatches": 4}), "divisor is 2"),
    "groups of one": (changed(ppo={"advantage": "grpo"}), "rollout.samples_per_prompt must be >= 2, got 1"),
    "zero": (changed(rollout={"num_prompts": 0}), "rollout.num_prompts must be > 0 and finite, got 0"),
    "infinite": (changed(rollout={"temperature": float("inf")}), "rollout.temperature must be > 0 and finite, got inf"),
    "nan": (changed(ppo={"gamma": float("nan")}), "ppo.gamma must be in [0, 1], got nan"),
    "out of range": (changed(ppo={"clip_low": 1.0}), "ppo.clip_low must be in [0, 1), got 1.0"),
    "negative": (changed(ppo={"kl_coef": -0.1}), "ppo.kl_coef must be >= 0, got -0.1"),
    "nan coefficient": (changed(ppo={"entropy_coef": float("nan")}), "ppo.entropy_coef must be >= 0, got nan"),
    "dual clip": (changed(ppo={"dual_clip": 0.5}), "ppo.dual_clip must be > 1 and finite, got 0.5"),
    "rate": (changed(critic_optimizer={"lr": float("inf")}), "lr must be finite and >= 0, got inf"),
    "template": (changed(data={"template": "Q: "}), "data.template must contain '{prompt}', got 'Q: '"),
    "function": (changed(rewards=[{"kind": "function", "target": "m.f"}]), "must be 'module:function', got 'm.f'"),
    "address": (changed(rewards=[{"kind": "http", "target": "localhost:80"}]), "http://, got 'localhost:80'"),
    "same names": (changed(rewards=MINIMAL["rewards"] * 2), "rewards need different names, got ['f', 'f']"),
    "critic from no reward model": (changed(critic={"init": "reward"}), "use 'policy' or a checkpoint"),
    "roll-back": (changed(ppo={"roll_back": True}), "ppo.roll_back needs ppo.target_kl"),
    "gradient-only estimator": (changed(ppo={"kl_estimator": "k3+"}), "in the reward use 'k3'"),
    "bootstrap": (
        changed(ppo={"truncation": "bootstrap", "advantage": "reinforce++"}),
        "needs a critic (ppo.advantage = 'gae'), got 'reinforce++'",
    ),
    "importance": (
        changed(ppo={"importance_cap": 2.0}, rollout={"old_logprobs": "sampler"}),
        "must be 'recompute' or 'auto', got 'sampler'",
    ),
    "one step off, embedded": (changed(rollout={"one_step_off": True}), "engine must be 'vllm', got 'embedded'"),
    "one step off, uncorrected": (
        changed(rollout={"one_step_off": True, "engine": "vllm"}),
        "set ppo.importance_cap, the truncation of the weights that correct for it",
    ),
    "no server": (changed(rollout={"vllm": {"servers": []}}), "rollout.vllm.servers is empty"),
    "no URL": (changed(rollout={"vllm": {"servers": ["here:80"]}}), "starts with http:// or https://, got 'here:80'"),
    "one server twice": (
        changed(rollout={"vllm": {"servers": ["http://a", "http://a"]}}),
        "rollout.vllm.servers has ['http://a'] twice",
    ),
    "early reward model": (
        changed(rewards=[{"kind": "model", "target": "a", "early": True}]),
        "rewards.early is for kind 'function' and 'http'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_value_is_one_sentence_with_what_was_got(case: str) -> None:
    tables, fragment = WRONG[case]
    with pytest.raises(ValueError, match=re.escape(fragment)) as error:
        from_dict(RunConfig, tables)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", [name for name, default in fields(RunConfig) if type(default) in (int, float)])
def test_no_number_may_be_nan_or_text(key: str) -> None:
    """Of all numbers that a run has; NaN compares with nothing, so a careless check lets it through."""
    *sections, name = key.split(".")
    for value in ("1", float("nan")):
        tables: dict[str, Any] = {name: value}
        for section in reversed(sections):
            tables = {section: tables}
        with pytest.raises(ValueError, match=name):
            from_dict(RunConfig, changed(**tables))


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"[policy]\npath = \n", "is not valid TOML: Invalid value (at line 2"),
        (b"[policy]\npath = 'a'\n[policy]\n", "is not valid TOML"),
        (b"out = '\xff'", "is not valid TOML"),
        (b"", "missing key 'policy'"),
        (None, "cannot read the run file"),
    ],
)
def test_a_file_that_is_no_run_file_is_named(content: bytes | None, fragment: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(fragment)) as error:
        load_config(path)
    assert str(path) in str(error.value) or content == b""


def test_the_config_of_a_run_folder_is_a_run_file(tmp_path: Path) -> None:
    config = from_dict(RunConfig, FULL)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(config)))
    assert load_config(path) == config
    path.write_text("{")
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        load_config(path)
