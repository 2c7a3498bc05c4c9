"""A whole run on disk: a tiny policy with a character tokenizer, prompts, and the run file that joins them."""

import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import tiny
from fastppo import RunConfig, Sample
from fastppo.demo import make_tokenizer
from fastppo.run_file import from_dict

NUM_PROMPTS = 6
fails_at: int | None = None  # the call in which `noisy` fails
calls: list[list[Sample]] = []  # what the function rewards below were given since a test cleared it


def checkpoint(folder: Path, *, kind: Any = AutoModelForCausalLM, seed: int = 0, tokenizer: bool = True) -> str:
    """A model of the tokenizer's vocabulary with random weights, saved; returns the folder."""
    config = tiny.CONFIGS["llama"]()
    config.vocab_size, config.num_labels = len(make_tokenizer()), 1
    torch.manual_seed(seed)
    kind.from_config(config).save_pretrained(folder)
    if tokenizer:
        make_tokenizer().save_pretrained(folder)
    return str(folder)


def prompts(path: Path) -> str:
    lines = (json.dumps({"prompt": f"{i}+{i}=", "answer": str(2 * i)}) for i in range(NUM_PROMPTS))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """What a run file says of a run of three iterations in `folder`; `changes` replace tables key by key."""
    out: dict[str, Any] = {
        "out": str(folder / "run"),
        "device": "cpu",
        "policy": {"path": checkpoint(folder / "policy")},
        "data": {"prompts": prompts(folder / "prompts.jsonl"), "eval_prompts": str(folder / "prompts.jsonl")},
        "rewards": [{"kind": "function", "target": "runs:digits"}],
        "rollout": {"num_prompts": 4, "temperature": 1.0, "max_new_tokens": 6},
        "ppo": {"num_epochs": 2, "num_minibatches": 2},
        "policy_optimizer": {"lr": 1e-3},
        "critic_optimizer": {"lr": 1e-3},
        "train": {"total_steps": 3, "eval_every": 2},
    }
    return merged(out, changes)


def merged(tables: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`tables` with `changes`: a table is changed key by key."""
    both = {key: tables[key] for key in changes if isinstance(tables.get(key), dict)}
    return {**tables, **changes, **{k: {**v, **changes[k]} for k, v in both.items() if isinstance(changes[k], dict)}}


def config(folder: Path, **changes: Any) -> RunConfig:
    return from_dict(RunConfig, settings(folder, **changes))


def run_file(folder: Path, **changes: Any) -> str:
    """The same as TOML; returns its path."""
    path = folder / "run.toml"
    path.write_text(toml(settings(folder, **changes)), encoding="utf-8")
    return str(path)


def toml(tables: Mapping[str, Any], where: str = "") -> str:
    """Numbers, text and lists of them are spelled as in JSON. `where`: of tables in a table, `rollout.` say."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in tables.items() if not _is_table(value)]
    for key, value in tables.items():
        for table in [value] if isinstance(value, dict) else value if _is_table(value) else []:
            lines += [f"[{where}{key}]" if isinstance(value, dict) else f"[[{where}{key}]]"]
            lines += [toml(table, f"{where}{key}.")]
    return "\n".join(lines) + "\n"


def own(stderr: str) -> str:
    """Without what torchao, where it is installed, says whenever transformers imports it."""
    return "".join(line for line in stderr.splitlines(True) if "torchao" not in line and "_pytree.py" not in line)


def rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file, every one of them whole."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def digits(samples: list[Sample]) -> list[float]:
    """How many tokens of the response are digits."""
    calls.append(samples)
    return [float(sum(1 <= t <= 10 for t in s.response_ids)) for s in samples]


def fails_in_the_third_iteration(samples: list[Sample]) -> list[float]:
    """After an evaluation, two iterations and another evaluation."""
    if len(calls) == 4:
        raise KeyError("no answer")
    return digits(samples)


def fails_on_the_second_rank(samples: list[Sample]) -> list[float]:
    """In its third iteration, when the environment says so."""
    if os.environ.get("RANK") == "1" and "REWARD_FAILS" in os.environ and len(calls) == 2:
        raise KeyError("no answer")
    return noisy(samples)


def always_fails(samples: list[Sample]) -> list[float]:
    raise KeyError("no answer")


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def noisy(samples: list[Sample]) -> list[float]:
    """Draws from every global generator a reward function might use."""
    if len(calls) == fails_at:
        raise KeyError("no answer")
    noise = random.random() + float(np.random.rand()) + float(torch.rand(()))
    return [score + noise for score in digits(samples)]
