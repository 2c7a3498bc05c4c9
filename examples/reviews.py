"""Film reviews on a CPU, from nothing: language model, sentiment reward model, PPO towards praise, an outside judge.

    python examples/reviews.py negative.txt positive.txt --out runs/reviews

The two files hold one review per line. The language model reads all of them but the held-out ones; the reward model
learns from one half, the judge (a linear classifier on words and word pairs) from the other, so that PPO cannot please
the judge by what is peculiar to the reward model.
"""

import argparse
import json
import random
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, PreTrainedTokenizerFast

from fastppo import (
    CriticConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
    models,
    pretrain,
    train,
)
from fastppo.report import table
from fastppo.run import move_aside

VOCAB = 4096
PROMPT_WORDS = 4
NUM_HELD_OUT = 256
FEATURES = 1 << 16  # hashed words and word pairs of the judge

Review = tuple[str, int]  # text, 1 for praise


@dataclass(frozen=True)
class Sizes:
    """Optimizer steps of each stage; the defaults fit two CPU cores in ten minutes."""

    lm_steps: int = 1400
    reward_steps: int = 200
    ppo_steps: int = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("negative", type=Path, help="file with one negative review per line")
    parser.add_argument("positive", type=Path, help="file with one positive review per line")
    parser.add_argument("--out", type=Path, default=Path("runs/reviews"))
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    run(read(args.negative, 0) + read(args.positive, 1), args.out, args.seed, Sizes())


def run(reviews: list[Review], out: Path, seed: int, sizes: Sizes) -> dict[str, float]:
    """All stages; returns the judge's verdict (see `report`)."""
    start = time.perf_counter()
    for_reward, for_judge, held_out = split(reviews, seed)
    judge = Judge(for_judge)
    print(f"judge: {judge.accuracy(for_reward):.3f} accuracy on the reviews of the reward model")
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer([text for text, _ in for_reward + for_judge])
    policy = train_language_model(tokenizer, for_reward + for_judge, sizes.lm_steps, seed)
    models.save(policy, out / "lm", tokenizer)
    reward = train_reward_model(policy, tokenizer, for_reward, sizes.reward_steps, seed)
    models.save(reward, out / "reward", tokenizer)
    write_prompts(out / "prompts.jsonl", [text for text, _ in for_reward + for_judge])
    write_prompts(out / "held_out.jsonl", [text for text, _ in held_out])
    move_aside(out / "ppo")  # an earlier run stays
    folder = train(run_config(out, seed, sizes.ppo_steps))
    return report(folder, judge, time.perf_counter() - start)


def run_config(out: Path, seed: int, steps: int) -> RunConfig:
    optimizer = OptimizerConfig(lr=2e-4, schedule="linear")
    return RunConfig(
        policy=ModelConfig(path=str(out / "lm")),
        critic=CriticConfig(init="reward"),
        rewards=(RewardConfig(kind="model", target=str(out / "reward"), name="sentiment"),),
        data=DataConfig(prompts=str(out / "prompts.jsonl"), eval_prompts=str(out / "held_out.jsonl")),
        rollout=RolloutConfig(num_prompts=128, temperature=1.0, max_new_tokens=40),
        ppo=PPOConfig(num_epochs=2, num_minibatches=4, kl_coef=0.2, missing_eos_score=-3.0),
        policy_optimizer=optimizer,
        critic_optimizer=optimizer,
        train=TrainConfig(total_steps=steps, eval_every=steps, eval_prompts_max=NUM_HELD_OUT),
        out=str(out / "ppo"),
        seed=seed,
    )


def read(path: Path, label: int) -> list[Review]:
    """Those of more than six words; a file that cannot be read ends the program."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise SystemExit(f"cannot read the reviews at {str(path)!r}, a UTF-8 file with one per line: {why}") from error
    return [(line.strip(), label) for line in lines if len(line.split()) > 6]


def split(reviews: list[Review], seed: int) -> tuple[list[Review], list[Review], list[Review]]:
    """Reviews of the reward model, of the judge, and held out (their first words are the evaluation's prompts)."""
    random.Random(seed).shuffle(reviews)
    rest = reviews[NUM_HELD_OUT:]
    return rest[: len(rest) // 2], rest[len(rest) // 2 :], reviews[:NUM_HELD_OUT]


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    tokenizer = ByteLevelBPETokenizer(add_prefix_space=True)
    tokenizer.train_from_iterator(texts, vocab_size=VOCAB, special_tokens=["<eos>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<eos>", pad_token="<eos>")


def train_language_model(tokenizer: Any, reviews: Sequence[Review], steps: int, seed: int) -> Any:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
    )
    policy = models.prepare_policy(models.new_causal_lm(config))
    examples = [(ids[:1], ids[1:]) for ids in encode(tokenizer, [text for text, _ in reviews])]
    pretrain.train_supervised(policy, examples, steps=steps, batch_size=64, lr=3e-3, seed=seed)
    return policy


def train_reward_model(policy: Any, tokenizer: Any, reviews: Sequence[Review], steps: int, seed: int) -> Any:
    """Praise is preferred to blame, whatever the film."""
    reward = models.reward_model_from(policy)
    good, bad = (encode(tokenizer, [text for text, label in reviews if label == side]) for side in (1, 0))
    comparisons = [(praise, [blame]) for praise, blame in zip(good, bad, strict=False)]
    random.Random(seed).shuffle(bad)
    comparisons += [(praise, [blame]) for praise, blame in zip(good, bad, strict=False)]
    pretrain.train_reward_model(reward, comparisons, steps=steps, batch_size=32, lr=5e-4, seed=seed)
    return reward


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(texts)).input_ids]


def write_prompts(path: Path, texts: Sequence[str]) -> None:
    lines = (json.dumps({"prompt": " ".join(text.split()[:PROMPT_WORDS])}) for text in texts)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


class Judge:
    """Logistic regression on hashed words and word pairs."""

    def __init__(self, reviews: Sequence[Review]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.zeros(FEATURES, 1, requires_grad=True)
        optimizer = torch.optim.Adam([self.weight], lr=0.02)
        bags = [features(text) for text, _ in reviews]
        labels = torch.tensor([float(label) for _, label in reviews])
        for _ in range(4):
            for index in torch.randperm(len(bags), generator=generator).split(64):
                loss = F.binary_cross_entropy_with_logits(self._logits([bags[i] for i in index]), labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    @torch.no_grad()
    def positive(self, texts: Sequence[str]) -> torch.Tensor:
        """(n,) bool, whether each text is praise."""
        return self._logits([features(text) for text in texts]) > 0

    def accuracy(self, reviews: Sequence[Review]) -> float:
        labels = torch.tensor([label == 1 for _, label in reviews])
        return float((self.positive([text for text, _ in reviews]) == labels).float().mean())

    def _logits(self, bags: Sequence[list[int]]) -> torch.Tensor:
        offsets = torch.tensor([0, *(len(bag) for bag in bags[:-1])]).cumsum(0)
        return F.embedding_bag(torch.tensor(sum(bags, [])), self.weight, offsets, mode="sum").squeeze(1)


def features(text: str) -> list[int]:
    words = text.lower().split()
    pairs = [f"{a} {b}" for a, b in zip(words, words[1:], strict=False)]
    return [zlib.crc32(feature.encode()) % FEATURES for feature in words + pairs] or [0]


def report(folder: Path, judge: Judge, seconds: float) -> dict[str, float]:
    """Before and after on the held-out prompts: samples, the judge's verdict in percent, KL of the last step."""
    samples = read_jsonl(folder / "samples.jsonl")
    last = max(row["step"] for row in samples)
    verdict: dict[str, float] = {}
    for title, step in (("before", 0), ("after", last)):
        rows = [row for row in samples if row["step"] == step]
        table(f"five samples {title} PPO", ("prompt", "response"), [(r["prompt"], r["response"]) for r in rows[:5]])
        verdict[title] = 100 * float(judge.positive([r["prompt"] + r["response"] for r in rows]).float().mean())
    verdict["kl"] = [row["objective/kl"] for row in read_jsonl(folder / "metrics.jsonl") if "objective/kl" in row][-1]
    gain = verdict["after"] - verdict["before"]
    print(f"judge: {verdict['before']:.1f} % positive before, {verdict['after']:.1f} % after ({gain:+.1f} points)")
    print(f"KL to the reference: {verdict['kl']:.2f} nats per response; {seconds:.0f} s in all; run folder {folder}")
    return verdict


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
