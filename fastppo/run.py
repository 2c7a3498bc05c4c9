"""What a run is made of, put together: what is quick to check comes first."""

import fcntl
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastppo import checkpoint, distributed, models
from fastppo.batch import Prompts
from fastppo.checks import InputError, require
from fastppo.config import RunConfig
from fastppo.data import PromptSource, load_prompts
from fastppo.engine import PPOEngine
from fastppo.metrics import Metrics, require_loggers, rewind
from fastppo.rewards import WeightedRewards, load_rewards
from fastppo.run_file import to_dict


@dataclass
class Run:
    """Everything a training run is made of, and how far it is."""

    config: RunConfig
    engine: PPOEngine
    rewards: WeightedRewards
    prompts: PromptSource
    eval_prompts: Prompts | None
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    metrics: Metrics
    lock: IO[str] | None
    step: int = 0  # iterations done
    boundary: dict[str, Any] | None = None  # the small state as the last iteration left it; None inside an update

    def close(self) -> None:
        """Close what writes to the run folder, and unlock it."""
        self.metrics.close()
        if self.lock is not None:
            self.lock.close()


def build(config: RunConfig, *, kept: int | None = None) -> Run:
    """Load prompts, models and rewards, and open the run folder.

    `kept`: the folder may hold a run, whose rows until this iteration stay; -1: none do. None: it must hold no run.
    """
    _seed(config.seed)
    _check_ranks(config)
    folder = Path(config.out)
    if distributed.rank() == 0 and kept is None:
        _check_folder(folder)
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
    _seed(config.seed)  # again: how much loading drew must not matter to what rewards draw
    lock = _open_folder(folder)
    if distributed.rank() == 0:
        if kept is not None:
            rewind(folder, kept)
            checkpoint.set_aside(folder / "checkpoints", kept)
        (folder / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n", encoding="utf-8")
    metrics = Metrics(folder if distributed.rank() == 0 else None, config.train.loggers, to_dict(config))
    return Run(config, engine, rewards, source, held_out, tokenizer, folder, metrics, lock)


def _seed(seed: int) -> None:
    """Every global generator that models, rewards and data may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _check_ranks(config: RunConfig) -> None:
    """Every rank cuts its own sequences into minibatches, so that the minibatch is the same on any number of ranks."""
    world = distributed.world_size()
    mine, parts = config.rollout.num_prompts * config.rollout.samples_per_prompt // world, config.ppo.num_minibatches
    require(
        mine % parts == 0,
        f"ppo.num_minibatches ({parts}) must divide the {mine} sequences of each of {world} ranks; "
        "change it, rollout.num_prompts or the number of ranks",
    )


def _check_folder(folder: Path) -> None:
    """A folder that holds a run is left alone; an empty metrics.jsonl is of one that failed at its start."""
    metrics = folder / "metrics.jsonl"
    used = (metrics.exists() and metrics.stat().st_size > 0) or any(folder.glob("checkpoints/*"))
    ways = "go on with --resume, give another `out`, or delete the folder"
    require(not used, f"{str(folder)!r} already holds a run (its metrics.jsonl or checkpoints): {ways}")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    require(
        there.is_dir() and os.access(there, os.W_OK),
        f"cannot make the run folder {str(folder)!r}: {str(there)!r} is no folder that can be written to",
    )


def _open_folder(folder: Path) -> IO[str] | None:
    """Make the run folder and lock it, on the rank that writes; returns the lock."""
    if distributed.rank() != 0:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise InputError(f"cannot write to the run folder {str(folder)!r}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it when the process ends, however
    except BlockingIOError as error:
        lock.close()
        raise InputError(f"another process trains in {str(folder)!r}: wait for it, or give another `out`") from error
    except OSError as error:
        lock.close()
        raise InputError(
            f"cannot lock the run folder {str(folder)!r} ({error.strerror}): give an `out` on a file system with flock"
        ) from error
    return lock


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
