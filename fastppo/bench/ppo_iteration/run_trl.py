"""Times TRL's PPOTrainer on the shared setting and prints one JSON line.

Run it with a Python that has trl, on an otherwise idle machine:

    python fastppo/bench/ppo_iteration/run_trl.py --iterations 4
"""

# pyright: reportMissingImports=false
# (trl and datasets are optional: a development environment does not carry them)

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import platform
import statistics
import sys
import tempfile
import time
from typing import Any

import accelerate
import datasets
import numpy as np
import tokenizers
import torch
import transformers
import trl
from peak_memory import PeakMemory, resident_bytes
from ppo_setting import PPOModels, PPOSetting, build_models, build_prompts, parser, setting_of
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

RSS_AFTER_IMPORTS = resident_bytes()
WARMUP_ITERATIONS = 1


class IterationClock(TrainerCallback):
    """Seconds and mean reward of each PPO iteration: TRL ends a "step" after rollout, scoring and all updates."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.rewards: list[float] = []
        self._last = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._last = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "objective/scores" in logs:
            self.rewards.append(logs["objective/scores"])


def parse_arguments() -> argparse.Namespace:
    """The defaults are the fastest of the combinations tried; the flags let a reader try others."""
    made = parser(__doc__)
    made.add_argument("--accumulation", type=int, default=1, help="gradient_accumulation_steps")
    made.add_argument("--rollout-batch", type=int, default=32, help="rows per rollout forward")
    made.add_argument("--attention", default="sdpa", choices=("sdpa", "eager"))
    arguments = made.parse_args()
    batch_size = setting_of(arguments).batch_size
    if arguments.iterations <= WARMUP_ITERATIONS:
        made.error(f"--iterations must be above {WARMUP_ITERATIONS}, the warm-up")
    if arguments.accumulation < 1 or batch_size % arguments.accumulation:
        made.error(f"--accumulation must divide the batch of {batch_size}")
    return arguments


def build_tokenizer(setting: PPOSetting) -> PreTrainedTokenizerFast:
    """TRL only asks it for special ids and padding.

    The pad id lies one past the model's vocabulary: TRL cuts a response at a sampled pad token, and this
    way none can be sampled.
    """
    names = {f"<{token}>": token for token in range(setting.vocab_size + 1)}
    backend = tokenizers.Tokenizer(WordLevel(names, unk_token="<0>"))
    pad = f"<{setting.vocab_size}>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad, eos_token=pad, padding_side="left")


def speed_options(arguments: argparse.Namespace, setting: PPOSetting) -> dict[str, Any]:
    """Options that change TRL's speed and not the PPO problem.

    One accumulation step, with the whole batch as "per device" batch, makes TRL's micro batch the whole
    minibatch of 16 and gives one unscaled optimizer step per minibatch. With more, each loss is divided by
    the accumulation count of the batch, not of the minibatch, and, as one data loader batch is the whole
    prompt set here, Accelerate steps after every micro batch: above `minibatches` that adds steps.
    """
    return {
        "per_device_train_batch_size": setting.batch_size // arguments.accumulation,
        "gradient_accumulation_steps": arguments.accumulation,
        "local_rollout_forward_batch_size": arguments.rollout_batch,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
    }


def quiet_options() -> dict[str, Any]:
    """Turns off what is no part of PPO: sample generation, evaluation, saving, reporting, progress bars."""
    return {
        "num_sample_generations": 0,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def build_config(arguments: argparse.Namespace, setting: PPOSetting, output_dir: str) -> PPOConfig:
    """The shared PPO numbers in TRL's names."""
    return PPOConfig(
        output_dir=output_dir,
        total_episodes=arguments.iterations * setting.batch_size,
        num_ppo_epochs=setting.ppo_epochs,
        num_mini_batches=setting.minibatches,
        response_length=setting.response_tokens,
        temperature=setting.temperature,
        learning_rate=setting.learning_rate,
        adam_epsilon=setting.adam_eps,
        lr_scheduler_type="constant",
        gamma=setting.gamma,
        lam=setting.lam,
        cliprange=setting.clip_range,
        cliprange_value=setting.value_clip_range,
        kl_coef=setting.kl_coef,
        vf_coef=setting.value_coef,
        seed=setting.sampling_seed,
        **speed_options(arguments, setting),
        **quiet_options(),
    )


def set_attention(models: PPOModels, implementation: str) -> None:
    """Uses one attention implementation in all four models."""
    for model in (models.policy, models.reference, models.value, models.reward):
        model.set_attn_implementation(implementation)


def build_trainer(arguments: argparse.Namespace, output_dir: str, clock: IterationClock) -> PPOTrainer:
    """The trainer over the shared models and prompts."""
    setting = setting_of(arguments)
    models = build_models(setting)
    set_attention(models, arguments.attention)
    trainer = PPOTrainer(
        args=build_config(arguments, setting, output_dir),
        processing_class=build_tokenizer(setting),
        model=models.policy,
        ref_model=models.reference,
        reward_model=models.reward,
        value_model=models.value,
        train_dataset=datasets.Dataset.from_dict({"input_ids": build_prompts(setting).tolist()}),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def optimizer_steps(trainer: PPOTrainer) -> int:
    """Steps the optimizer really took, read from its own state, to show that none was skipped."""
    return max(int(state["step"]) for state in trainer.optimizer.state.values())


def versions() -> dict[str, str]:
    """Versions of everything that sets the speed."""
    modules = (trl, transformers, torch, accelerate, datasets, tokenizers)
    return {"python": platform.python_version()} | {module.__name__: module.__version__ for module in modules}


def result(arguments: argparse.Namespace, clock: IterationClock, peak_bytes: int, steps: int) -> dict[str, Any]:
    """The record to print; the median leaves the warm-up out, the list keeps it."""
    setting, seconds = setting_of(arguments), clock.seconds
    settings = dataclasses.asdict(setting) | speed_options(arguments, setting)
    settings |= {"attention": arguments.attention, "warmup_iterations": WARMUP_ITERATIONS}
    return {
        "system": f"trl-{trl.__version__}",
        "seconds_per_iteration": [round(value, 4) for value in seconds],
        "median_seconds": round(statistics.median(seconds[WARMUP_ITERATIONS:]), 4),
        "rewards": [round(x, 5) for x in clock.rewards],
        "peak_rss_above_imports_mb": round((peak_bytes - RSS_AFTER_IMPORTS) / 2**20, 1),
        "optimizer_steps": steps,
        "versions": versions(),
        "settings": settings,
    }


def main() -> None:
    """Runs TRL's own training loop once and prints the record."""
    arguments = parse_arguments()
    torch.set_num_threads(setting_of(arguments).threads)
    np.random.seed(setting_of(arguments).sampling_seed)  # TRL orders its minibatches by numpy and seeds only torch
    clock = IterationClock()
    # TRL prints a banner: standard output is kept for the JSON line. The models are built inside the block,
    # so their weights count as memory of the run.
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as output_dir, PeakMemory() as memory:
        trainer = build_trainer(arguments, output_dir, clock)
        trainer.train()
    print(json.dumps(result(arguments, clock, memory.peak_bytes, optimizer_steps(trainer))))


if __name__ == "__main__":
    main()
