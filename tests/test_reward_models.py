"""A reward model reads the last real token, whoever is beside it, in whatever tokenizer and architecture it speaks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    LlamaConfig,
    PreTrainedModel,
)

import tiny
from batches import (
    bfloat16,
    trajectories,
)
from fastppo import RewardConfig, RewardModel, Rollout, WeightedRewards, models
from fastppo.config import DataConfig
from fastppo.rewards import load_rewards, to_samples
from texts import word_tokenizer

POLICY_WORDS = ["<pad>", "<eos>", "good", "bad", "cat", "dog", "a", "the"]
REWARD_WORDS = ["<unk>", "<pad>", "the", "a", "dog", "cat", "bad", "good", "<eos>", "never"]


def classifier(architecture: str, labels: int = 1, pad: int | None = None) -> PreTrainedModel:
    config = tiny.CONFIGS[architecture]()
    config.num_labels = labels
    torch.manual_seed(3)
    raw = AutoModelForSequenceClassification.from_config(config)
    raw.config.pad_token_id = pad
    return raw


def prepared(raw: PreTrainedModel) -> PreTrainedModel:
    return models.frozen(models.prepare(raw))


def scores(model: PreTrainedModel, rollout: Rollout, **kwargs: Any) -> torch.Tensor:
    return torch.tensor(RewardModel(model, **kwargs)(to_samples(rollout, None)))


def alone(raw: PreTrainedModel, rollout: Rollout, label: int = 0) -> torch.Tensor:
    """transformers' own forward of each sequence by itself."""
    raw.set_attn_implementation("eager")
    with torch.no_grad():
        ids = [torch.tensor([[*p, *r]]) for p, r in rollout.sequences()]
        return torch.cat([raw.eval()(input_ids=x).logits[:, label] for x in ids])


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_score_alone_is_the_score_in_any_batch(architecture: str, batch_size: int) -> None:
    """CORRECTNESS B6."""
    rollout = trajectories()
    expected = alone(classifier(architecture, pad=0), rollout)
    made = scores(prepared(classifier(architecture)), rollout, batch_size=batch_size)
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pad", [None, 7])
def test_the_end_token_is_read_even_if_it_is_the_padding(pad: int | None) -> None:
    """CORRECTNESS B6, B1: what transformers' classifier skips when pad == eos."""
    rollout = Rollout.pack([[1, 2], [3], [4, 5, 6]], [[5, 7], [8, 9, 9, 7], [7]])
    expected = scores(prepared(classifier("llama")), rollout)
    torch.testing.assert_close(scores(prepared(classifier("llama", pad=pad)), rollout), expected, atol=0, rtol=0)
    without = Rollout.pack([[1, 2], [3], [4, 5, 6]], [[5], [8, 9, 9], []])
    assert (scores(prepared(classifier("llama", pad=pad)), without) != expected).all()


@pytest.mark.parametrize("label", [0, 2])
def test_the_label_picks_the_logit(label: int) -> None:
    rollout = trajectories()
    expected = alone(classifier("llama", labels=3, pad=0), rollout, label)
    torch.testing.assert_close(
        scores(prepared(classifier("llama", labels=3)), rollout, label=label), expected, atol=1e-5, rtol=0
    )


def test_a_label_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"label must be in \[0, 1\)"):
        RewardModel(prepared(classifier("llama")), label=1)


def saved_with_tokenizer(raw: PreTrainedModel, words: Sequence[str], folder: Path) -> str:
    raw.save_pretrained(folder)
    word_tokenizer(words).save_pretrained(folder)
    return str(folder)


def two_answers(tokenizer: Any) -> Rollout:
    prompt = tokenizer("the cat ").input_ids
    answers = [[*tokenizer("a good dog").input_ids, tokenizer.eos_token_id], tokenizer("a bad").input_ids]
    return Rollout.pack([prompt, prompt], answers, finish_reasons=["stop", "length"])


def llama(vocab: int) -> LlamaConfig:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaConfig(vocab_size=vocab, num_labels=1, pad_token_id=None, **shape)  # pyright: ignore


class Spaced:
    """The policy's tokenizer, whose text has its spaces back."""

    def __init__(self) -> None:
        self.inner = word_tokenizer(POLICY_WORDS)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __len__(self) -> int:
        return len(self.inner)

    def __call__(self, text: str) -> Any:
        return self.inner(text)

    def batch_decode(self, ids: list[list[int]], skip_special_tokens: bool) -> list[str]:
        words = [[POLICY_WORDS[i] for i in row if i > 1 or not skip_special_tokens] for row in ids]
        return ["".join(word + " " for word in row) for row in words]


def test_reward_model_with_another_tokenizer_reads_the_text(tmp_path: Path) -> None:
    """CORRECTNESS P13: and the end of the answer in its own end token, where the answer did end."""
    torch.manual_seed(1)
    raw = AutoModelForSequenceClassification.from_config(llama(len(REWARD_WORDS)))
    path = saved_with_tokenizer(raw, REWARD_WORDS, tmp_path)
    policy_tokenizer: Any = Spaced()
    rewards = load_rewards([RewardConfig(kind="model", target=path)], policy_tokenizer, torch.device("cpu"))
    made = rewards(two_answers(policy_tokenizer))
    index = REWARD_WORDS.index
    texts = [["the", "cat", "a", "good", "dog", "<eos>"], ["the", "cat", "a", "bad"]]
    raw.config.pad_token_id = 1
    with torch.no_grad():
        expected = [float(raw.eval()(input_ids=torch.tensor([[index(w) for w in t]])).logits[0, 0]) for t in texts]
    assert made.sequences.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("reason", "end"), [("stop", ["<eos>"]), ("length", [])])
def test_reward_model_reads_a_chat_in_its_own_template(reason: Any, end: list[str], tmp_path: Path) -> None:
    """And a cut answer as one that goes on."""
    torch.manual_seed(1)
    raw = AutoModelForSequenceClassification.from_config(llama(len(REWARD_WORDS)))
    tokenizer = word_tokenizer(REWARD_WORDS)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'the ' if m.role == 'user' else 'a ' }}{{ m.content }}"
        "{{ ' ' if m.role == 'user' else ' <eos>' }}{% endfor %}"
    )
    raw.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config, data = RewardConfig(kind="model", target=str(tmp_path)), DataConfig(prompts="", chat=True)
    policy: Any = Spaced()
    rewards = load_rewards([config], policy, torch.device("cpu"), data)
    answer = policy("good").input_ids
    made = rewards(Rollout.pack([[3, 4]], [answer], finish_reasons=[reason], records=[{"prompt": "cat"}]))
    words = ["the", "cat", "a", "good", *end]
    raw.config.pad_token_id = 1
    with torch.no_grad():
        expected = raw.eval()(input_ids=torch.tensor([[REWARD_WORDS.index(w) for w in words]])).logits[0, 0]
    assert made.sequences.tolist() == pytest.approx([float(expected)], abs=1e-6)


def test_reward_model_with_the_same_tokenizer_reads_the_ids(tmp_path: Path) -> None:
    raw = AutoModelForSequenceClassification.from_config(llama(len(POLICY_WORDS)))
    path = saved_with_tokenizer(raw, POLICY_WORDS, tmp_path)
    rewards = load_rewards([RewardConfig(kind="model", target=path)], word_tokenizer(POLICY_WORDS), torch.device("cpu"))
    rollout = two_answers(word_tokenizer(POLICY_WORDS))
    assert rewards.rewards[0].tokenizer is None  # pyright: ignore[reportAttributeAccessIssue]
    raw.config.pad_token_id = 0
    torch.testing.assert_close(rewards(rollout).sequences, alone(raw, rollout), atol=1e-6, rtol=0)


def test_reward_model_without_a_vocabulary_for_the_policy_is_refused(tmp_path: Path) -> None:
    AutoModelForSequenceClassification.from_config(llama(4)).save_pretrained(tmp_path)
    config = RewardConfig(kind="model", target=str(tmp_path))
    with pytest.raises(ValueError, match="a vocabulary of 4, smaller than the policy's 8"):
        load_rewards([config], word_tokenizer(POLICY_WORDS), torch.device("cpu"))


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2),
        DistilBertConfig(dim=16, hidden_dim=32, n_layers=1, n_heads=2),
    ],
    ids=["bert", "distilbert"],
)
def test_encoder_reward_model_is_padded_by_length(config: Any, tmp_path: Path) -> None:
    config.vocab_size, config.num_labels = 48, 2
    torch.manual_seed(2)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    raw = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    made = scores(models.load_reward_model(str(tmp_path)), trajectories(), label=1)
    torch.testing.assert_close(made, alone(raw, trajectories(), label=1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_reward_model_made_from_a_bfloat16_policy_scores_in_float32(architecture: str) -> None:
    model = models.frozen(models.reward_model_from(bfloat16(tiny.policy(architecture))))
    made = scores(model, trajectories())
    assert made.dtype == torch.float32 and bool(made.isfinite().all()) and float(made.std()) > 0


def test_rewards_are_added_up_with_their_weights() -> None:
    class Constant:
        def __init__(self, name: str, value: float) -> None:
            self.name, self.value = name, value

        def __call__(self, samples: Sequence[Any]) -> list[float]:
            return [self.value] * len(samples)

    made = WeightedRewards([Constant("a", 2.0), Constant("b", 3.0)], weights=[1.0, -0.5])(trajectories())
    assert made.sequences.tolist() == [0.5] * 8
    assert {name: part[0].item() for name, part in made.parts.items()} == {"a": 2.0, "b": 3.0}
