"""Times PPOEngine on the shared setting and prints one JSON line, in the form of bench_trl_ppo.py.

python bench/bench_fastppo.py --iterations 4
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import time
from typing import Any

import torch
import transformers
from peak_memory import PeakMemory, resident_bytes
from ppo_setting import SETTING, build_models, build_prompts

import fastppo
from fastppo import OptimizerConfig, PPOConfig, PPOEngine, Prompts, RewardModel, RolloutConfig, WeightedRewards, models

RSS_AFTER_IMPORTS = resident_bytes()
WARMUP_ITERATIONS = 1


def build_engine(max_tokens: int) -> tuple[PPOEngine, WeightedRewards]:
    """The shared models and PPO numbers in fastppo's names."""
    four = build_models()
    optimizer = OptimizerConfig(lr=SETTING.learning_rate, schedule="constant", max_grad_norm=None)
    engine = PPOEngine(
        models.prepare_policy(four.policy),
        reference=models.prepare_policy(four.reference),
        critic=models.critic_from(four.value, label=0),
        ppo=PPOConfig(
            num_epochs=SETTING.ppo_epochs,
            num_minibatches=SETTING.minibatches,
            max_tokens_per_microbatch=max_tokens,
            clip_low=SETTING.clip_range,
            clip_high=SETTING.clip_range,
            value_clip=SETTING.value_clip_range,
            value_coef=SETTING.value_coef,
            gamma=SETTING.gamma,
            lam=SETTING.lam,
            kl_coef=SETTING.kl_coef,
            truncation="none",
        ),
        rollout=RolloutConfig(
            num_prompts=SETTING.prompts,
            temperature=SETTING.temperature,
            max_new_tokens=SETTING.response_tokens,
        ),
        policy_optimizer=optimizer,
        critic_optimizer=optimizer,
        seed=SETTING.sampling_seed,
    )
    reward = models.reward_model_from(four.reward)
    models.value_head(reward).load_state_dict(four.reward.score.state_dict())
    return engine, WeightedRewards([RewardModel(models.frozen(reward))])


def iterate(engine: PPOEngine, rewards: WeightedRewards, prompts: Prompts) -> dict[str, float]:
    """One PPO iteration; seconds of each phase."""
    marks = [time.perf_counter()]
    rollout = engine.generate(prompts)
    marks.append(time.perf_counter())
    scores = rewards(rollout)
    marks.append(time.perf_counter())
    experience = engine.score(rollout, scores)
    marks.append(time.perf_counter())
    steps = engine.update(experience)["policy/steps"]
    marks.append(time.perf_counter())
    assert steps == SETTING.optimizer_steps_per_iteration, steps
    phases = ("rollout", "reward", "score", "update")
    return {name: b - a for name, a, b in zip(phases, marks, marks[1:], strict=False)}


def result(rows: list[dict[str, float]], peak_bytes: int, max_tokens: int) -> dict[str, Any]:
    """The record to print; the medians leave the warm-up out, the list keeps it."""
    seconds, timed = [sum(row.values()) for row in rows], rows[WARMUP_ITERATIONS:]
    return {
        "system": f"fastppo-{fastppo.__version__}",
        "seconds_per_iteration": [round(value, 4) for value in seconds],
        "median_seconds": round(statistics.median(seconds[WARMUP_ITERATIONS:]), 4),
        "phases": {name: round(statistics.median(row[name] for row in timed), 4) for name in timed[0]},
        "peak_rss_above_imports_mb": round((peak_bytes - RSS_AFTER_IMPORTS) / 2**20, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "settings": dataclasses.asdict(SETTING) | {"max_tokens_per_microbatch": max_tokens},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=4, help="PPO iterations; the first is a warm-up")
    parser.add_argument("--max-tokens", type=int, default=1024, help="tokens per micro-batch")
    arguments = parser.parse_args()
    torch.set_num_threads(SETTING.threads)
    with PeakMemory() as memory:
        engine, rewards = build_engine(arguments.max_tokens)
        prompts = Prompts(token_ids=tuple(tuple(row) for row in build_prompts().tolist()))
        rows = [iterate(engine, rewards, prompts) for _ in range(arguments.iterations)]
    print(json.dumps(result(rows, memory.peak_bytes, arguments.max_tokens)))


if __name__ == "__main__":
    main()
