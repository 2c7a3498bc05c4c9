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
from fastppo.checks import InputError, require
from fastppo.config import RunConfig
from fastppo.data import PromptSource, load_prompts, select
from fastppo.engine import PPOEngine
from fastppo.metrics import Metrics, PhaseTimer, require_loggers
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
    joined_group: bool


def train(config: RunConfig) -> Path:
    """Run PPO as `config` says; returns the run folder.

    Ctrl-C saves a checkpoint under `checkpoints/interrupted` and returns. Any other failure saves it too and is raised.
    Of several ranks the first one writes everything.

    Raises:
        ValueError: the config names something that is missing or damaged, or the run folder already holds a run.
        RewardError: a reward failed.
    """
    run = build(config)
    with _saved_on_failure(run), progress(config.train.total_steps, quiet=not _writes()) as show:
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
    """Open the run folder and load prompts, models and rewards: what is quick to check comes first."""
    joined_group = distributed.init()
    torch.manual_seed(config.seed)
    folder = _open_folder(config.out)
    require_loggers(config.train.loggers)
    device = _device(config.device)
    tokenizer = models.load_tokenizer(config.policy.path, trust_remote_code=config.policy.trust_remote_code)
    source = PromptSource(
        load_prompts(config.data.prompts, config.data, tokenizer),
        config.rollout.num_prompts,
        seed=config.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    evals = config.data.eval_prompts
    held_out = None if evals is None else load_prompts(evals, config.data, tokenizer)
    policy = models.to_device(models.load_policy(config.policy), device)
    size = models.lm_head(policy).weight.shape[0]
    require(
        len(tokenizer) <= size,
        f"the tokenizer at {config.policy.path!r} has {len(tokenizer)} tokens, but the model only {size}: "
        "the folder must hold the tokenizer that the model was trained with",
    )
    _check_lengths(source.prompts, held_out, policy, config)
    rewards = load_rewards(config.rewards, tokenizer, device)
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
    if _writes():
        (folder / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n", encoding="utf-8")
    metrics = Metrics(folder if _writes() else None, config.train.loggers, to_dict(config))
    return Run(config, engine, rewards, source, held_out, tokenizer, folder, metrics, joined_group)


def evaluate(run: Run, step: int) -> dict[str, float]:
    """Sample one response to each held-out prompt, score it, log the means and write the samples. Not on every rank."""
    if run.eval_prompts is None or not _writes():
        return {}
    prompts = select(run.eval_prompts, range(min(len(run.eval_prompts), run.config.train.eval_prompts_max)))
    top_k = 1 if run.config.train.eval_greedy else 0
    sampling = replace(run.engine.sampling, samples_per_prompt=1, top_k=top_k, seed=run.config.seed)
    rollout = run.engine.generate(prompts, sampling)
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
    if not _writes():
        return folder
    partial = folder.with_name(f".{name}.partial")
    run.engine.save(partial)
    move_aside(folder)
    partial.rename(folder)
    return folder


def move_aside(folder: Path) -> None:
    """Keep what is there under another name."""
    if folder.exists():
        folder.rename(folder.with_name(f"{folder.name}.old-{folder.stat().st_mtime_ns}"))


@contextmanager
def _saved_on_failure(run: Run) -> Iterator[None]:
    """Whatever ends the run, the weights trained so far are on disk afterwards."""
    try:
        yield
    except KeyboardInterrupt:
        _save_interrupted(run, "interrupted")
    except Exception:
        _save_interrupted(run, "failed")
        raise
    finally:
        run.metrics.close()
        if run.joined_group:
            distributed.leave()


def _save_interrupted(run: Run, why: str) -> None:
    folder = save(run, "interrupted")
    if _writes():
        print(f"{why}: saved {folder}", flush=True)


def _writes() -> bool:
    """Whether this rank writes to the run folder."""
    return distributed.rank() == 0


def _open_folder(out: str) -> Path:
    """Make the run folder; one that already holds a run is left alone."""
    folder, metrics = Path(out), Path(out, "metrics.jsonl")
    if _writes():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the run folder {out!r}: {error.strerror}") from error
        used = metrics.exists() and metrics.stat().st_size > 0  # empty: the run failed before its first number
        require(not used, f"{out!r} already holds a run (its metrics.jsonl): give another `out`, or delete the folder")
    return folder


def _device(name: str) -> torch.device:
    """Under torchrun every rank takes the GPU of its local rank."""
    available = torch.cuda.is_available()
    require(name != "cuda" or available, "device = 'cuda', but torch finds no CUDA device here: use 'auto' or 'cpu'")
    device = torch.device(name if name != "auto" else "cuda" if available else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(distributed.local_rank())
    return torch.device(device.type, distributed.local_rank()) if device.type == "cuda" else device


def _check_lengths(prompts: Prompts, held_out: Prompts | None, policy: PreTrainedModel, config: RunConfig) -> None:
    """A prompt that is too long must not end a run at the step that happens to draw it."""
    longest = max(len(ids) for ids in prompts.token_ids) + config.rollout.max_new_tokens
    budget = config.ppo.max_tokens_per_microbatch
    require(
        longest <= budget,
        f"the longest prompt and rollout.max_new_tokens make {longest} tokens, more than "
        f"ppo.max_tokens_per_microbatch = {budget}: raise it to at least that",
    )
    evaluated = max((len(ids) for ids in held_out.token_ids), default=0) if held_out is not None else 0
    longest, context = max(longest, evaluated + config.rollout.max_new_tokens), models.context_length(policy)
    require(
        longest <= context,
        f"the longest prompt and rollout.max_new_tokens make {longest} tokens, more than the model's "
        f"context of {context}: set data.max_prompt_tokens and data.skip_long, or lower max_new_tokens",
    )


def _critic(
    config: RunConfig, policy: PreTrainedModel, rewards: WeightedRewards, device: torch.device
) -> PreTrainedModel:
    checkpointing = config.critic.gradient_checkpointing
    if config.critic.init == "policy":
        return models.critic_from(policy, gradient_checkpointing=checkpointing)
    if config.critic.init == "reward":
        place = next(i for i, r in enumerate(config.rewards) if r.kind == "model")
        reward: Any = rewards.rewards[place]
        require(
            reward.tokenizer is None and models.is_decoder(reward.model),
            "critic.init = 'reward' needs a reward model that reads the policy's tokens from left to right, but "
            f"{reward.name!r} has a tokenizer of its own or is an encoder: use 'policy' or a checkpoint",
        )
        return models.critic_from(reward.model, label=reward.label, gradient_checkpointing=checkpointing)
    critic = models.load_critic(
        config.critic.init,
        config.policy.dtype,
        gradient_checkpointing=checkpointing,
        trust_remote_code=config.policy.trust_remote_code,
    )
    return models.to_device(critic, device)
