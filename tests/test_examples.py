"""The examples parse, and the one that needs no download runs end to end on made-up reviews."""

import importlib.util
import math
import random
from pathlib import Path
from types import ModuleType

import pytest

from fastppo import Sample, load_config

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda p: p.name)
def test_run_files_are_legal(path):
    config = load_config(path)
    assert config.rollout.num_prompts in (256, 512)


def test_gsm8k_settings_are_the_published_ones():
    config = load_config(EXAMPLES / "gsm8k.toml")
    assert (config.ppo.gamma, config.ppo.lam, config.ppo.kl_coef, config.ppo.value_clip) == (1, 1, 0.001, 0.5)
    assert (config.policy_optimizer.lr, config.critic_optimizer.lr) == (1e-6, 1e-5)
    assert load_config(EXAMPLES / "tldr.toml").policy_optimizer.max_grad_norm is None


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("48/2 = 24\n#### 72", 1.0),
        ("#### 1,072 and then #### 72.", 1.0),
        ("#### 7", 0.0),
        ("the answer is 72", 0.0),
    ],
)
def test_gsm8k_reward_reads_the_last_answer(response, score):
    record = {"question": "?", "answer": "<<48/2=24>>24\n#### 72"}
    sample = Sample(prompt="?", response=response, prompt_ids=[], response_ids=[], finish_reason="stop", record=record)
    assert load("gsm8k").score([sample]) == [score]


@pytest.mark.parametrize(
    ("content", "why"), [(None, "No such file or directory"), (b"caf\xe9", "'utf-8' codec can't decode")]
)
def test_reviews_that_cannot_be_read_are_one_sentence(content, why, tmp_path):
    path = tmp_path / "negative.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        load("reviews").read(path, 0)
    assert f"cannot read the reviews at {str(path)!r}, a UTF-8 file with one per line: {why}" in str(ended.value)


@pytest.mark.slow
def test_reviews_runs_end_to_end(tmp_path):
    reviews, rng = load("reviews"), random.Random(0)
    words = {0: ["dull", "slow", "bad", "weak", "poor"], 1: ["warm", "fresh", "good", "fine", "rich"]}
    made = []
    for i in range(1600):
        filler = rng.choices(["the", "film", "plot", "cast", "story", "has", "is", "with", "and", "a"], k=9)
        made.append((" ".join([*filler[:5], *rng.choices(words[i % 2], k=4), *filler[5:]]), i % 2))
    sizes = reviews.Sizes(lm_steps=60, reward_steps=30, ppo_steps=12)
    verdict = reviews.run(made, tmp_path, 1, sizes)
    assert set(verdict) == {"before", "after", "kl"} and all(math.isfinite(x) for x in verdict.values())
    assert verdict["after"] > verdict["before"]
