"""Times PPOEngine on the shared setting and prints one JSON line, in the form of run_trl.py.

python fastppo/bench/ppo_iteration/run_fastppo.py --iterations 4
"""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
import time
from typing import Any

import torch
import transformers
from peak_memory import PeakMemory, resident_bytes
from ppo_setting import PPOSetting, build_models, build_prompts, parser, setting_of

import fastppo
from fastppo import (
    LayersConfig,
    OptimizerConfig,
    PPOConfig,
    PPOEngine,
    Prompts,
    RewardModel,
    RolloutConfig,
    WeightedRewards,
    models,
)

RSS_AFTER_IMPORTS = resident_bytes()
WARMUP_ITERATIONS = 1


def build_engine(setting: PPOSetting, max_tokens: int) -> tuple[PPOEngine, WeightedRewards]:
    """The shared models and PPO numbers in fastppo's names."""
    four = build_models(setting)
    optimizer = OptimizerConfig(lr=setting.learning_rate, eps=setting.adam_eps, schedule="constant", max_grad_norm=None)
    engine = PPOEngine(
        models.prepare_policy(four.policy),
        reference=models.prepare_policy(four.reference),
        critic=models.critic_from(four.value, label=0),
        ppo=PPOConfig(
            num_epochs=setting.ppo_epochs,
            num_minibatches=setting.minibatches,
            max_tokens_per_microbatch=max_tokens,
            clip_low=setting.clip_range,
            clip_high=setting.clip_range,
            value_clip=setting.value_clip_range,
            value_coef=setting.value_coef,
            gamma=setting.gamma,
            lam=setting.lam,
            kl_coef=setting.kl_coef,
            truncation="none",
        ),
        rollout=RolloutConfig(
            num_prompts=setting.prompts,
            temperature=setting.temperature,
            max_new_tokens=setting.response_tokens,
        ),
        policy_optimizer=optimizer,
        critic_optimizer=optimizer,
        seed=setting.sampling_seed,
    )
    reward = models.reward_model_from(four.reward)
    models.value_head(reward).load_state_dict(four.reward.score.state_dict())
    for model in (engine.policy, engine.reference, engine.critic):
        assert model is not None
        models.fuse_layers(model, LayersConfig(fused="native"))
    return engine, WeightedRewards([RewardModel(models.frozen(reward))])


def iterate(
    engine: PPOEngine, rewards: WeightedRewards, prompts: Prompts, setting: PPOSetting
) -> tuple[dict[str, float], float]:
    """One PPO iteration; seconds of each phase, and the mean reward."""
    marks = [time.perf_counter()]
    rollout = engine.generate(prompts)
    marks.append(time.perf_counter())
    scores = rewards(rollout)
    marks.append(time.perf_counter())
    experience = engine.score(rollout, scores)
    marks.append(time.perf_counter())
    steps = engine.update(experience)["policy/steps"]
    marks.append(time.perf_counter())
    assert steps == setting.optimizer_steps_per_iteration, steps
    phases = ("rollout", "reward", "score", "update")
    seconds = {name: b - a for name, a, b in zip(phases, marks, marks[1:], strict=False)}
    return seconds, float(scores.sequences.mean())


def result(
    rows: list[dict[str, float]], means: list[float], peak_bytes: int, setting: PPOSetting, max_tokens: int
) -> dict[str, Any]:
    """The record to print; the medians leave the warm-up out, the list keeps it."""
    seconds, timed = [sum(row.values()) for row in rows], rows[WARMUP_ITERATIONS:]
    return {
        "system": f"fastppo-{fastppo.__version__}",
        "seconds_per_iteration": [round(value, 4) for value in seconds],
        "median_seconds": round(statistics.median(seconds[WARMUP_ITERATIONS:]), 4),
        "phases": {name: round(statistics.median(row[name] for row in timed), 4) for name in timed[0]},
        "rewards": [round(x, 5) for x in means],
        "peak_rss_above_imports_mb": round((peak_bytes - RSS_AFTER_IMPORTS) / 2**20, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "settings": dataclasses.asdict(setting) | {"max_tokens_per_microbatch": max_tokens},
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--max-tokens", type=int, default=1024, help="tokens per micro-batch")
    options = made.parse_args()
    setting = setting_of(options)
    torch.set_num_threads(setting.threads)
    with PeakMemory() as memory:
        engine, rewards = build_engine(setting, options.max_tokens)
        prompts = Prompts(token_ids=tuple(tuple(row) for row in build_prompts(setting).tolist()))
        done = [iterate(engine, rewards, prompts, setting) for _ in range(options.iterations)]
    rows, means = [row for row, _ in done], [mean for _, mean in done]
    print(json.dumps(result(rows, means, memory.peak_bytes, setting, options.max_tokens)))


if __name__ == "__main__":
    main()
