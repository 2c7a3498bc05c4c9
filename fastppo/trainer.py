"""train(): the PPO loop, one line per phase."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastppo import distributed, models
from fastppo.batch import Prompts, Rollout
from fastppo.config import RunConfig
from fastppo.data import PromptSource, load_prompts, select
from fastppo.engine import PPOEngine
from fastppo.metrics import Metrics, PhaseTimer
from fastppo.report import progress
from fastppo.rewards import Scores, WeightedRewards, load_rewards, to_samples
from fastppo.run_file import to_dict


@dataclass
class Run:
    """Everything a training run is made of."""

    config: RunConfig
    engine: PPOEngine
    rewards: WeightedRewards
    prompts: PromptSource
    eval_prompts: Prompts | None
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    metrics: Metrics


def train(config: RunConfig) -> Path:
    """Run PPO as `config` says; returns the run folder.

    Ctrl-C saves a checkpoint and returns. Any other failure saves one too, under `checkpoints/interrupted`, and is raised.
    """
    run = build(config)
    with _saved_on_failure(run), progress(config.train.total_steps) as show:
        evaluate(run, step=0)
        for step in range(1, config.train.total_steps + 1):
            timer = PhaseTimer()
            prompts = next(run.prompts)
            with timer("rollout"):
                rollout = run.engine.generate(prompts)
            with timer("reward"):
                scores = run.rewards(rollout)
            with timer("score"):
                experience = run.engine.score(rollout, scores)
            with timer("update"):
                stats = run.engine.update(experience)
            log(run, step, stats, rollout, timer)
            show(stats)
            if step % config.train.eval_every == 0 or step == config.train.total_steps:
                evaluate(run, step)
            if config.train.save_every and step % config.train.save_every == 0:
                save(run, f"step-{step:06d}")
        save(run, "final")
    return run.folder


def build(config: RunConfig) -> Run:
    """Load models, rewards and prompts, and open the run folder."""
    distributed.init()
    torch.manual_seed(config.seed)
    device = torch.device(config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = models.load_tokenizer(config.policy.path, trust_remote_code=config.policy.trust_remote_code)
    policy = models.load_policy(config.policy).to(device)
    rewards = load_rewards(config.rewards, tokenizer, device)
    prompts = load_prompts(config.data.prompts, config.data, tokenizer)
    held_out = None if config.data.eval_prompts is None else load_prompts(config.data.eval_prompts, config.data, tokenizer)
    engine = PPOEngine(
        policy,
        critic=_critic(config, policy, rewards, device) if config.ppo.advantage == "gae" else None,
        reference=None if config.policy.reference is None else models.load_reference(config.policy, policy),
        tokenizer=tokenizer,
        ppo=config.ppo,
        rollout=config.rollout,
        policy_optimizer=config.policy_optimizer,
        critic_optimizer=config.critic_optimizer,
        total_steps=config.train.total_steps,
        seed=config.seed + 100003 * distributed.rank(),  # ranks sample differently (N+ details)
    )
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n", encoding="utf-8")
    source = PromptSource(
        prompts,
        config.rollout.num_prompts,
        seed=config.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    metrics = Metrics(folder, config.train.loggers, to_dict(config))
    return Run(config, engine, rewards, source, held_out, tokenizer, folder, metrics)


def evaluate(run: Run, step: int) -> dict[str, float]:
    """Sample one response to each held-out prompt, score it, log the means and write the samples."""
    if run.eval_prompts is None:
        return {}
    prompts = select(run.eval_prompts, range(min(len(run.eval_prompts), run.config.train.eval_prompts_max)))
    rollout = run.engine.generate(prompts, replace(run.engine.sampling, samples_per_prompt=1))
    scores = run.rewards(rollout)
    stats = {"eval/scores": float(scores.totals(rollout).mean())}
    stats |= {f"eval/reward/{name}": float(part.mean()) for name, part in scores.parts.items()}
    stats["eval/response_tokens"] = float(rollout.action_counts.float().mean())
    stats["eval/truncated_frac"] = float(rollout.truncated.float().mean())
    run.metrics.log(stats, step)
    write_samples(run, step, rollout, scores)
    return stats


def write_samples(run: Run, step: int, rollout: Rollout, scores: Scores) -> None:
    """Append every evaluated sample to samples.jsonl."""
    with (run.folder / "samples.jsonl").open("a", encoding="utf-8") as file:
        for sample, score in zip(to_samples(rollout, run.tokenizer), scores.totals(rollout).tolist(), strict=True):
            row = {"step": step, "score": score, "prompt": sample.prompt, "response": sample.response}
            file.write(json.dumps({**row, "finish_reason": sample.finish_reason}) + "\n")


def log(run: Run, step: int, stats: dict[str, float], rollout: Rollout, timer: PhaseTimer) -> None:
    """One line of metrics per iteration."""
    stats |= timer.seconds
    stats["perf/tokens_per_second"] = len(rollout.input_ids) / timer.total()
    stats["episode"] = float(step * len(rollout) * distributed.world_size())
    run.metrics.log(stats, step)


def save(run: Run, name: str) -> Path:
    """Write `checkpoints/<name>` with policy, critic and tokenizer; a half-written folder never has the name."""
    folder = run.folder / "checkpoints" / name
    partial = folder.with_name(f".{name}.partial")
    run.engine.save(partial)
    if folder.exists():
        folder.rename(folder.with_name(f"{name}.old-{folder.stat().st_mtime_ns}"))
    partial.rename(folder)
    return folder


@contextmanager
def _saved_on_failure(run: Run) -> Iterator[None]:
    """Whatever ends the run, the weights trained so far are on disk afterwards."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"interrupted: saved {save(run, 'interrupted')}")
    except Exception:
        print(f"failed: saved {save(run, 'interrupted')}")
        raise
    finally:
        run.metrics.close()


def _critic(
    config: RunConfig, policy: PreTrainedModel, rewards: WeightedRewards, device: torch.device
) -> PreTrainedModel:
    checkpointing = config.critic.gradient_checkpointing
    if config.critic.init == "policy":
        return models.critic_from(policy, gradient_checkpointing=checkpointing)
    if config.critic.init == "reward":
        place = next(i for i, r in enumerate(config.rewards) if r.kind == "model")
        reward: Any = rewards.rewards[place]
        return models.critic_from(reward.model, label=reward.label, gradient_checkpointing=checkpointing).to(device)
    return models.load_critic(config.critic.init, config.policy.dtype, gradient_checkpointing=checkpointing).to(device)
