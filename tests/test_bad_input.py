"""Damaged checkpoints and trajectories are refused in one sentence, and a failure changes nothing that is trained."""

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import runs
import tiny
from batches import SCORES, engine, prompts, weights
from fastppo import FunctionReward, ModelConfig, PPOEngine, RewardConfig, RewardError, Rollout, WeightedRewards, models
from fastppo.rewards import load_rewards
from fastppo.run import build

RIGHT = {"kind": "function", "target": "runs:digits"}
Damage = Callable[[Path], object]
WEIGHTS, CONFIG = "model.safetensors", "config.json"


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def garbage(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(bytes(range(256)) * 64)


def flipped_bits(folder: Path) -> None:
    """Every exponent bit set in one row that no short check reads."""
    state = load_file(folder / WEIGHTS)
    state["model.embed_tokens.weight"].view(torch.int32)[12] |= 0x7F800000
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def without(name: str) -> Damage:
    def damage(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        save_file({k: v for k, v in state.items() if name not in k}, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def in_config(**values: Any) -> Damage:
    def damage(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | values))

    return damage


def renamed(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


DAMAGED: dict[str, tuple[Damage, str]] = {
    "no folder": (renamed, "there is no folder"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "Unrecognized model"),
    "config is not JSON": (lambda folder: (folder / CONFIG).write_text("{oops"), "is not a valid JSON file"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "no file named model.safetensors"),
    "empty weights": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "SafetensorError"),
    "truncated": (truncate, "SafetensorError"),
    "garbage": (garbage, "SafetensorError"),
    "flipped bits": (flipped_bits, "has NaN or infinity in 1 tensors, the first is 'model.embed_tokens.weight'"),
    "tensor missing": (without("1.mlp.up_proj"), "lacks 1 tensors, the first is 'model.layers.1.mlp.up_proj"),
    "no head": (without("lm_head"), "lacks 1 tensors, the first is 'lm_head.weight'"),
    "wrong shape": (in_config(intermediate_size=48), "has the wrong shape for 6 tensors"),
    "more layers": (in_config(num_hidden_layers=3), "lacks 9 tensors"),
    "another architecture": (in_config(model_type="gpt2", architectures=["GPT2LMHeadModel"]), "GPT2|lacks .* tensors"),
    "unknown architecture": (in_config(model_type="llamma"), "llamma"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_checkpoint_is_refused_and_named(case: str, tmp_path: Path) -> None:
    """transformers would fill most of these with noise."""
    damage, fragment = DAMAGED[case]
    path = runs.checkpoint(tmp_path / "policy")
    models.load_policy(ModelConfig(path=path))
    damage(Path(path))
    with pytest.raises(ValueError, match=fragment) as error:
        models.load_policy(ModelConfig(path=path))
    assert path in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["missing", "garbage"])
def test_a_damaged_tokenizer_is_refused_and_named(damage: str, tmp_path: Path) -> None:
    path = runs.checkpoint(tmp_path / "policy", tokenizer=damage == "garbage")
    if damage == "garbage":
        (tmp_path / "policy" / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match="no usable tokenizer at " + re.escape(repr(path))):
        models.load_tokenizer(path)


def test_a_model_smaller_than_its_tokenizer_is_refused(tmp_path: Path) -> None:
    config = runs.config(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(config.policy.path)
    tokenizer.add_tokens(["<a>", "<b>"])
    tokenizer.save_pretrained(config.policy.path)
    with pytest.raises(ValueError, match="the tokenizer at .* has 15 tokens, but the model only 13"):
        build(config)


@pytest.mark.parametrize(
    ("reward", "fragment"),
    [
        ({"target": "runs:nothing"}, "cannot import 'runs:nothing': AttributeError: module 'runs' has no"),
        ({"target": "nowhere:score"}, "cannot import 'nowhere:score': .*; is its folder on PYTHONPATH"),
        ({"target": "runs:NUM_PROMPTS"}, "'runs:NUM_PROMPTS' must be a function, got a int"),
        ({"kind": "http", "target": "http://localhost/${NOT_THERE}"}, "NOT_THERE"),
    ],
    ids=lambda x: x["target"] if isinstance(x, dict) else "",
)
def test_a_reward_that_is_not_there_is_said_before_weights_are_read(
    reward: dict[str, str], fragment: str, tmp_path: Path
) -> None:
    """These weights cannot be read; the second of two rewards is looked at too."""
    config = runs.config(tmp_path, rewards=[RIGHT, {"kind": "function", "name": "wrong", **reward}])
    truncate(Path(config.policy.path))
    with pytest.raises(ValueError, match=fragment):
        build(config)


def test_models_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    tiny.raw_lm().save_pretrained(tmp_path / "large")
    policy_path = runs.checkpoint(tmp_path / "policy")
    policy = models.load_policy(ModelConfig(path=policy_path))
    with pytest.raises(ValueError, match="reference and policy must share a vocabulary, got 48 and 13 entries"):
        models.load_reference(ModelConfig(path=policy_path, reference=str(tmp_path / "large")), policy)
    with pytest.raises(ValueError, match="lacks 1 tensors, the first is 'score.weight'"):
        models.load_reward_model(policy_path)  # a language model is no reward model
    path = runs.checkpoint(tmp_path / "reward", kind=AutoModelForSequenceClassification)
    with pytest.raises(ValueError, match=r"label must be in \[0, 1\), the labels of the reward model, got 2"):
        load_rewards(
            [RewardConfig(kind="model", target=path, label=2)], models.load_tokenizer(policy_path), policy.device
        )


def test_critic_cannot_start_from_a_reward_model_of_other_tokens(tmp_path: Path) -> None:
    """Its body would read the policy's ids as other words."""
    path = runs.checkpoint(tmp_path / "reward", kind=AutoModelForSequenceClassification)
    rewards = [{"kind": "model", "target": path}]
    build(runs.config(tmp_path, rewards=rewards, critic={"init": "reward"})).close()
    tokenizer = json.loads((tmp_path / "reward" / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["1"], vocab["2"] = vocab["2"], vocab["1"]
    (tmp_path / "reward" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="critic.init = 'reward' needs .* 'reward' has a tokenizer of its own"):
        build(runs.config(tmp_path, rewards=rewards, critic={"init": "reward"}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device = 'cuda', but torch finds no CUDA device here: use 'auto' or 'cpu'"):
        build(runs.config(tmp_path, device="cuda"))


BAD_TRAJECTORIES: dict[str, tuple[dict[str, Any], str]] = {
    "no sequences": ({"prompts": [], "responses": []}, "a rollout needs at least one sequence, got none"),
    "too few responses": ({"responses": [[3]]}, "responses must have one entry per prompt (2), got 1"),
    "empty prompt": ({"prompts": [[1], []]}, "prompt 1 is empty: the first action needs a token before it"),
    "negative id": ({"responses": [[3, -100], [4]]}, "token ids must be integers >= 0, got [-100]"),
    "fractional id": ({"responses": [[3, 1.5], [4]]}, "token ids must be integers >= 0, got [1.5]"),
    "unknown reason": ({"finish_reasons": ["stop", "eos"]}, "finish_reason must be 'stop' or 'length', got 'eos'"),
    "too few reasons": ({"finish_reasons": ["stop"]}, "finish_reasons must have one entry per prompt (2), got 1"),
    "mask too short": ({"loss_masks": [[True], [True]]}, "loss_masks[0] must have one entry per response token"),
    "too few masks": ({"loss_masks": [[True, True]]}, "loss_masks must have one entry per prompt (2), got 1"),
    "log-probs too long": ({"logprobs": [[-1.0] * 2] * 2}, "logprobs[1] must have one entry per response token"),
    "positive log-prob": ({"logprobs": [[-1.0, 0.5], [-1.0]]}, "natural logarithms <= 0 at every action; got [0.5]"),
    "nan log-prob": ({"logprobs": [[-1.0, math.nan], [-1.0]]}, "natural logarithms <= 0 at every action; got [nan]"),
    "log of zero": ({"logprobs": [[-math.inf, -1.0], [-1.0]]}, "natural logarithms <= 0 at every action; got [-inf]"),
    "too many groups": ({"group_ids": [0, 0, 1]}, "group_ids must have one entry per prompt (2), got 3"),
    "too few records": ({"records": [{}]}, "records must have one entry per prompt (2), got 1"),
}


@pytest.mark.parametrize("case", BAD_TRAJECTORIES)
def test_trajectories_that_do_not_fit_together_are_refused(case: str) -> None:
    changes, fragment = BAD_TRAJECTORIES[case]
    good: dict[str, Any] = {"prompts": [[1, 2], [5]], "responses": [[3, 4], [4]]}
    Rollout.pack(**good)
    with pytest.raises(ValueError, match=re.escape(fragment)):
        Rollout.pack(**good | changes)


def test_log_probs_of_tokens_the_policy_did_not_choose_may_be_anything() -> None:
    masks = [[False, True]]
    rollout = Rollout.pack([[1]], [[2, 3]], loss_masks=masks, logprobs=[[math.nan, -0.5]])
    assert rollout.logprobs is not None and rollout.logprobs.tolist() == [-0.5]


def test_ids_beyond_the_vocabulary_are_refused() -> None:
    """A GPU would only say that an assertion failed."""
    with pytest.raises(ValueError, match=r"token ids must be in \[0, 48\), the policy's vocabulary, got 48"):
        engine().score(Rollout.pack([[1]], [[tiny.VOCAB]]), [1.0])


def state(made: PPOEngine) -> list[Any]:
    """All that an iteration reads or writes: weights, optimizers, random numbers, controllers."""
    roles = [made._policy, *([made._critic] if made._critic else [])]
    numbers = (made.version, made.iteration, made.kl.coef, made.moments.count, made.moments.mean, made.moments.std)
    generators = (made.generator, made.rollout_engine.generator, torch.default_generator)  # pyright: ignore
    return [
        [weights(role.model) for role in roles],
        [copy.deepcopy(role.optimizer.state_dict()) for role in roles],
        [generator.get_state() for generator in generators],
        [(role.iteration, role.skipped) for role in roles] + [numbers],
    ]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


BAD_SCORES: dict[str, Callable[[Rollout], Any]] = {
    "nan": lambda rollout: [*SCORES[:-1], math.nan],
    "too few": lambda rollout: SCORES[:-1],
    "a reward that raises": WeightedRewards([FunctionReward(runs.always_fails)]),
}


@pytest.mark.parametrize("case", BAD_SCORES)
def test_a_bad_score_changes_nothing_and_the_next_good_one_trains(case: str) -> None:
    """Bit for bit what training does that never saw it."""
    ends = []
    for scores in (None, BAD_SCORES[case]):
        torch.manual_seed(0)
        made = engine(ppo={"normalize_scores": True, "kl_target": 6.0, "num_minibatches": 2})
        made.update(made.score(made.generate(prompts()), SCORES))
        rollout = made.generate(prompts())
        before = state(made)
        if scores is not None:
            with pytest.raises(RewardError):
                made.score(rollout, scores(rollout))
            assert same(state(made), before)
        made.update(made.score(rollout, SCORES))
        ends.append(state(made))
        assert not same(ends[-1][0], before[0])
    assert same(*ends)
