"""`fastppo demo`: four real models on one machine in minutes, nothing downloaded.

Two-digit sums written as text. A small transformer learns from demonstrations half of which are wrong, a reward model
learns to tell right answers from wrong ones, and PPO turns the one into what the other prefers. Held-out sums judge.
"""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from transformers import LlamaConfig, PreTrainedTokenizerFast

from fastppo import models, pretrain
from fastppo.batch import Sample
from fastppo.config import (
    CriticConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from fastppo.report import table
from fastppo.run import move_aside
from fastppo.trainer import train

NUM_HELD_OUT = 512
WRONG_DEMONSTRATIONS = 0.5
WRONG_IN_DEMONSTRATIONS = (4, 0, 4, 0, 1, 1)  # weights of the kinds of `_wrong`
WRONG_IN_COMPARISONS = (2, 2, 3, 1, 1, 1)  # near misses too: PPO finds what the reward model cannot tell apart
WRONG_PER_RIGHT = 3
VARIANTS = 16  # demonstrations and comparisons per problem, so that their mistakes cannot be learned by heart


@dataclass(frozen=True)
class Sizes:
    """How long each stage runs; the defaults fit two CPU cores in five minutes."""

    sft_steps: int = 800
    reward_steps: int = 1600
    ppo_steps: int = 200


def demo(out: str | Path = "runs/demo", *, seed: int = 1, sizes: Sizes | None = None) -> dict[str, float]:
    """Run the demo; returns what it writes to `out`/summary.json."""
    out, sizes, start = Path(out), sizes or Sizes(), time.perf_counter()

    def announce(stage: str) -> None:
        print(f"{time.perf_counter() - start:4.0f} s  {stage}", flush=True)

    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    problems = make_problems()
    rng.shuffle(problems)
    held_out, training = problems[:NUM_HELD_OUT], problems[NUM_HELD_OUT:]
    announce(f"data: {len(training)} sums to train on, {len(held_out)} held out")
    _write_prompts(out / "prompts.jsonl", training)
    _write_prompts(out / "held_out.jsonl", held_out)
    tokenizer = make_tokenizer()
    announce(f"demonstrations: a policy learns from answers of which {WRONG_DEMONSTRATIONS:.0%} are wrong")
    policy = _train_policy(tokenizer, training, rng, sizes.sft_steps, seed)
    models.save(policy, out / "sft", tokenizer)
    announce("reward model: it learns to tell a right answer from wrong ones")
    reward = _train_reward(policy, tokenizer, training, rng, sizes.reward_steps, seed)
    models.save(reward, out / "reward", tokenizer)
    announce(f"PPO: {sizes.ppo_steps} iterations, evaluated on the held-out sums")
    move_aside(out / "ppo")
    folder = train(run_config(out, seed=seed, steps=sizes.ppo_steps))
    summary = summarize(folder) | {"wall_seconds": time.perf_counter() - start}
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _report(folder, out, summary)
    return summary


def run_config(out: Path, *, seed: int, steps: int) -> RunConfig:
    """The PPO run of the demo, as a run file would give it."""
    optimizer = OptimizerConfig(lr=3e-4, schedule="linear")
    return RunConfig(
        policy=ModelConfig(path=str(out / "sft")),
        critic=CriticConfig(init="reward"),
        rewards=(
            RewardConfig(kind="model", target=str(out / "reward"), name="reward_model"),
            RewardConfig(kind="function", target="fastppo.demo:exact_match", name="exact_match", weight=0.0),
        ),
        data=DataConfig(prompts=str(out / "prompts.jsonl"), eval_prompts=str(out / "held_out.jsonl")),
        rollout=RolloutConfig(num_prompts=256, temperature=1.0, max_new_tokens=5),
        ppo=PPOConfig(num_epochs=2, num_minibatches=4, kl_coef=0.05, missing_eos_score=-5.0),
        policy_optimizer=optimizer,
        critic_optimizer=optimizer,
        train=TrainConfig(total_steps=steps, eval_every=max(1, steps // 4), eval_prompts_max=NUM_HELD_OUT),
        out=str(out / "ppo"),
        seed=seed,
    )


def exact_match(samples: list[Sample]) -> list[float]:
    """1 where the response is the right sum, else 0. The judge: PPO is not trained on it (its weight is 0)."""
    return [float(s.finish_reason == "stop" and s.response == s.record["answer"]) for s in samples]


def make_problems() -> list[tuple[int, int]]:
    """Every sum of two two-digit numbers that has two digits itself: 3240 of them."""
    return [(a, b) for a in range(10, 90) for b in range(10, 100 - a)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    vocab = {c: i for i, c in enumerate(["<eos>", *"0123456789+="])}
    tokenizer = Tokenizer(token_models.WordLevel(vocab, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def summarize(folder: Path) -> dict[str, float]:
    """First and last evaluation, and the last iteration, of a run's metrics."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluations = [r for r in rows if "eval/scores" in r]
    steps = [r for r in rows if "objective/scores" in r]
    first, last = evaluations[0], evaluations[-1]
    return {
        "exact_match_before": first["eval/reward/exact_match"],
        "exact_match_after": last["eval/reward/exact_match"],
        "reward_before": first["eval/scores"],
        "reward_after": last["eval/scores"],
        "kl_final": steps[-1]["objective/kl"],
        "tokens_per_second": sum(r["perf/tokens_per_second"] for r in steps) / len(steps),
    }


def _train_policy(tokenizer: Any, problems: list[tuple[int, int]], rng: random.Random, steps: int, seed: int) -> Any:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
    )
    policy = models.prepare_policy(models.new_causal_lm(config))
    demonstrations = []
    for a, b in problems * VARIANTS:
        answer = str(a + b) if rng.random() >= WRONG_DEMONSTRATIONS else _wrong(a + b, rng, WRONG_IN_DEMONSTRATIONS)
        demonstrations.append((_ids(tokenizer, f"{a}+{b}="), [*_ids(tokenizer, answer), tokenizer.eos_token_id]))
    pretrain.train_supervised(policy, demonstrations, steps=steps, batch_size=256, lr=2e-3, seed=seed)
    return policy


def _train_reward(
    policy: Any, tokenizer: Any, problems: list[tuple[int, int]], rng: random.Random, steps: int, seed: int
) -> Any:
    """Starts from the policy's body, which can already add; learns which answers are wrong."""
    reward = models.reward_model_from(policy)

    def ids(a: int, b: int, answer: str) -> list[int]:
        return [*_ids(tokenizer, f"{a}+{b}={answer}"), tokenizer.eos_token_id]

    comparisons = []
    for a, b in problems * VARIANTS:
        wrong = [_wrong(a + b, rng, WRONG_IN_COMPARISONS) for _ in range(WRONG_PER_RIGHT)]
        comparisons.append((ids(a, b, str(a + b)), [ids(a, b, answer) for answer in wrong]))
    pretrain.train_reward_model(reward, comparisons, steps=steps, batch_size=48, lr=5e-4, seed=seed)
    return reward


def _wrong(right: int, rng: random.Random, weights: Sequence[int]) -> str:
    """A wrong answer of one of six kinds, which `weights` choose from."""
    tens, ones = divmod(right, 10)
    kinds = [
        f"{tens}{rng.randint(0, 9)}",  # the last digit is hard to judge,
        f"{tens}{(ones + rng.choice([-1, 1])) % 10}",  # most of all when it is off by one
        f"{(tens + rng.choice([-1, 1])) % 10}{ones}",
        str(right + rng.choice([-1, 1])),
        str(rng.randint(10, 99)),
        rng.choice(["", str(tens), f"{right}{rng.randint(0, 9)}"]),
    ]
    wrong = rng.choices(kinds, weights)[0]
    return wrong if wrong != str(right) else _wrong(right, rng, weights)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text).input_ids)


def _write_prompts(path: Path, problems: Sequence[tuple[int, int]]) -> None:
    lines = (json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) for a, b in problems)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _report(folder: Path, out: Path, summary: dict[str, float]) -> None:
    rows = [
        ("exact match", f"{summary['exact_match_before']:.3f}", f"{summary['exact_match_after']:.3f}"),
        ("reward model", f"{summary['reward_before']:.2f}", f"{summary['reward_after']:.2f}"),
    ]
    table(f"{NUM_HELD_OUT} held-out sums, sampled at temperature 1", ("", "before PPO", "after PPO"), rows)
    print(f"KL to the reference {summary['kl_final']:z.2f} nats per response; {summary['wall_seconds']:.0f} s in all")
    print(f"run folder: {folder} (metrics.jsonl, samples.jsonl, checkpoints/final); summary: {out / 'summary.json'}")
