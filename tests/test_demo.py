"""The demo's parts, and the demo itself."""

import json
import random
import re
import subprocess
import sys

import pytest

from fastppo import demo
from fastppo.batch import Sample


def test_the_tokenizer_reads_back_what_it_writes():
    tokenizer = demo.make_tokenizer()
    ids = tokenizer("12+34=46").input_ids
    assert len(ids) == 8 and tokenizer.decode(ids) == "12+34=46"
    assert tokenizer.eos_token_id == tokenizer.pad_token_id


def test_wrong_answers_are_wrong_and_of_many_kinds():
    rng = random.Random(0)
    for weights in (demo.WRONG_IN_DEMONSTRATIONS, demo.WRONG_IN_COMPARISONS):
        answers = {demo._wrong(46, rng, weights) for _ in range(500)}
        assert "46" not in answers and {"45", "47", "36", "56", ""} <= answers


def test_every_problem_is_a_two_digit_sum():
    problems = demo.make_problems()
    assert len(set(problems)) == len(problems) == 3240
    assert all(a >= 10 and b >= 10 and a + b < 100 for a, b in problems)


@pytest.mark.parametrize(("response", "reason", "score"), [("46", "stop", 1), ("46", "length", 0), ("64", "stop", 0)])
def test_exact_match_wants_the_sum_and_an_end(response, reason, score):
    record = {"answer": "46"}
    sample = Sample(
        prompt="12+34=", response=response, prompt_ids=[1], response_ids=[2], finish_reason=reason, record=record
    )
    assert demo.exact_match([sample]) == [score]


@pytest.mark.slow
def test_the_demo_says_what_it_does_as_it_goes(tmp_path, capsys):
    demo.demo(tmp_path, sizes=demo.Sizes(sft_steps=1, reward_steps=1, ppo_steps=1))
    stages = re.findall(r"^ *\d+ s  ([\w ]+):", capsys.readouterr().out, re.MULTILINE)
    assert stages == ["data", "demonstrations", "reward model", "PPO"]


@pytest.mark.slow
def test_the_demo_learns_to_add(tmp_path):
    subprocess.run([sys.executable, "-m", "fastppo", "demo", "--out", str(tmp_path)], check=True, timeout=1500)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["exact_match_before"] <= 0.6
    assert summary["exact_match_after"] >= 0.9
    assert summary["reward_after"] > summary["reward_before"]
    assert 0 < summary["kl_final"] < 5
    assert {"wall_seconds", "tokens_per_second"} <= set(summary)
