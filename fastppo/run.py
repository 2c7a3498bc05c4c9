"""What a run is made of, put together: what is quick to check comes first."""

import fcntl
import json
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastppo import checkpoint, distributed, models
from fastppo.adamw import require_torchao
from fastppo.batch import Prompts
from fastppo.checks import InputError, require
from fastppo.config import RunConfig
from fastppo.data import PromptSource, load_prompts
from fastppo.durable import replace_text
from fastppo.engine import PPOEngine
from fastppo.kept_rollout import Kept
from fastppo.memory import start as memory
from fastppo.metrics import Metrics, require_loggers, rewind
from fastppo.rewards import WeightedRewards, endpoint_of, load_rewards
from fastppo.rollout_source import RolloutSource
from fastppo.run_file import to_dict
from fastppo.saving import Writer
from fastppo.watch import Watch
from fastppo_kernels.backend import choose_backend


@dataclass
class Run:
    """Everything a training run is made of, and how far it is."""

    config: RunConfig
    engine: PPOEngine
    rewards: WeightedRewards
    prompts: PromptSource
    rollouts: RolloutSource
    eval_prompts: Prompts | None
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    metrics: Metrics
    lock: IO[str] | None
    step: int = 0  # iterations done
    boundary: dict[str, Any] | None = None  # the small state as the last iteration left it; None inside an update
    saved: bool = False  # whether that state is on disk, or being written
    kept: Kept | None = None  # this iteration's rollout, once it is finished
    best: float | None = None  # the highest eval/scores, of checkpoints/best
    rolled_back_to: int | None = None  # iteration of the checkpoint that skipped steps last led back to
    writer: Writer = field(default_factory=Writer)
    watch: Watch = field(init=False)

    def __post_init__(self) -> None:
        self.watch = Watch(self.config.watch)

    def close(self) -> None:
        """End what still samples, close what writes to the run folder, and unlock it."""
        self.rollouts.close()
        self.writer.close()
        try:
            self.metrics.close()
        finally:
            if self.lock is not None:
                self.lock.close()


def build(config: RunConfig, lock: IO[str] | None = None, *, kept: int = 0) -> Run:
    """Load prompts, models and rewards, then take over the run folder, as iteration `kept` left it."""
    for reward in config.rewards:
        endpoint_of(reward)  # a target that is missing is said before anything is loaded
    _seed(config.seed)
    _check_ranks(config)
    folder = Path(config.out)
    require_loggers(config.train.loggers)
    _require_extras(config)
    device = _device(config.device)
    _check_backend(device)
    models.require_fused(config.layers, device)
    memory.check_device(config, device)
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
    plan = memory.check_start(config, device, _longest(source.prompts)[1], _longest(held_out))
    policy = models.to_device(models.load_policy(config.policy, config.layers), device)
    size = models.lm_head(policy).weight.shape[0]
    require(
        len(tokenizer) <= size,
        f"the tokenizer at {config.policy.path!r} has {len(tokenizer)} tokens, but the model only {size}: "
        "the folder must hold the tokenizer that the model was trained with",
    )
    _check_lengths(source.prompts, held_out, policy, config)
    policy = models.adapt(policy, config.memory, seed=config.seed) if config.memory.share == "lora" else policy
    rewards = load_rewards(config.rewards, tokenizer, device, config.data, policy, config.offload.reward)
    _name_foreign_code(config)
    engine = PPOEngine(
        policy,
        critic=_critic(config, policy, rewards, device) if config.ppo.advantage == "gae" else None,
        reference=None if config.policy.reference is None else models.load_reference(config.policy, policy),
        tokenizer=tokenizer,
        ppo=config.ppo,
        rollout=config.rollout,
        policy_optimizer=config.policy_optimizer,
        critic_optimizer=config.critic_optimizer,
        offload=config.offload,
        total_steps=config.train.total_steps,
        seed=config.seed + 100003 * distributed.rank(),  # ranks sample differently (N+ details)
    )
    for model in (engine.policy, engine.critic, engine.reference):
        if model is not None:
            models.fuse_layers(model, config.layers, device)
    _seed(config.seed + distributed.rank())  # again: how much loading drew must not matter to what rewards draw
    if distributed.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        again = kept % config.train.eval_every == 0 or kept >= config.train.total_steps
        checkpoint.set_aside(folder / "checkpoints", kept)  # before the rows that lead to them are dropped
        rewind(folder, kept, evaluates=again and config.data.eval_prompts is not None)
        memory.write(plan, folder)
        replace_text(folder / "config.json", json.dumps(to_dict(config), indent=2) + "\n")
    metrics = Metrics(folder if distributed.rank() == 0 else None, config.train.loggers, to_dict(config), kept)
    rollouts = RolloutSource(engine, source, rewards, config.train.total_steps, ahead=config.rollout.one_step_off)
    return Run(config, engine, rewards, source, rollouts, held_out, tokenizer, folder, metrics, lock)


def _name_foreign_code(config: RunConfig) -> None:
    """What runs in this process beside fastppo because the config says so."""
    called = [reward.target for reward in config.rewards if reward.kind == "function"]
    called += [s for s in (config.data.prompts, config.data.eval_prompts) if s and ":" in s and not Path(s).exists()]
    trusted = [config.policy.path] if config.policy.trust_remote_code else []
    trusted += [reward.target for reward in config.rewards if reward.kind == "model" and reward.trust_remote_code]
    if (called or trusted) and distributed.rank() == 0:
        print("runs foreign code:", ", ".join(dict.fromkeys([*called, *trusted])), flush=True)


def _seed(seed: int) -> None:
    """Every global generator that models, rewards and data may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _check_backend(device: torch.device) -> None:
    """A FASTPPO_BACKEND that cannot run here is said before anything is loaded."""
    try:
        choose_backend("training", None, torch.zeros(1, device=device))
    except ValueError as error:
        raise InputError(str(error)) from error


def _require_extras(config: RunConfig) -> None:
    """What is not installed is said before anything is loaded."""
    if config.memory.share == "lora":
        models.require_peft()
    for optimizer in (config.policy_optimizer, config.critic_optimizer):
        require_torchao(optimizer)


def _check_ranks(config: RunConfig) -> None:
    """Every rank cuts its own sequences into minibatches, so that the minibatch is the same on any number of ranks."""
    world = distributed.world_size()
    mine, parts = config.rollout.num_prompts * config.rollout.samples_per_prompt // world, config.ppo.num_minibatches
    require(
        mine % parts == 0,
        f"ppo.num_minibatches ({parts}) must divide the {mine} sequences of each of {world} ranks; "
        "change it, rollout.num_prompts or the number of ranks",
    )


def open_folder(folder: Path) -> IO[str] | None:
    """Make the run folder and lock it, on the rank that writes; returns the lock, held until it is closed.

    Raises:
        ValueError: it cannot be written to or locked, or another process has it.
    """
    if distributed.rank() != 0:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    except OSError as error:
        raise InputError(f"cannot write to the run folder {str(folder)!r}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it when the process ends, however
        if not os.path.samestat(os.fstat(lock.fileno()), (folder / ".lock").stat()):
            raise BlockingIOError  # `leave_folder` of another process removed it in between
    except (BlockingIOError, FileNotFoundError) as error:
        lock.close()
        raise InputError(f"another process trains in {str(folder)!r}: wait for it, or give another `out`") from error
    except OSError as error:
        lock.close()
        raise InputError(
            f"cannot lock the run folder {str(folder)!r} ({error.strerror}): give an `out` on a file system with flock"
        ) from error
    return lock


def leave_folder(folder: Path, lock: IO[str]) -> None:
    """Unlock; a folder in which nothing was written is removed."""
    if [path.name for path in folder.iterdir()] == [".lock"]:
        (folder / ".lock").unlink()
        folder.rmdir()
    lock.close()


def move_aside(folder: Path) -> None:
    """Keep what is there under another name, unless a process trains in it (a ValueError)."""
    if folder.exists():
        lock = open_folder(folder)
        folder.rename(folder.with_name(f"{folder.name}.old-{folder.stat().st_mtime_ns}"))
        if lock is not None:
            lock.close()


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
    longest = _longest(prompts)[1] + config.rollout.max_new_tokens
    budget = config.ppo.max_tokens_per_microbatch
    require(
        longest <= budget,
        f"the longest prompt and rollout.max_new_tokens make {longest} tokens, more than "
        f"ppo.max_tokens_per_microbatch = {budget}: raise it to at least that",
    )
    longest, context = (
        max(longest, _longest(held_out)[1] + config.rollout.max_new_tokens),
        models.context_length(policy),
    )
    require(
        longest <= context,
        f"the longest prompt and rollout.max_new_tokens make {longest} tokens, more than the model's "
        f"context of {context}: set data.max_prompt_tokens and data.skip_long, or lower max_new_tokens",
    )


def _longest(prompts: Prompts | None) -> tuple[int, int]:
    """How many, and tokens of the longest."""
    lengths = [len(ids) for ids in prompts.token_ids] if prompts is not None else []
    return len(lengths), max(lengths, default=0)


def _critic(
    config: RunConfig, policy: PreTrainedModel, rewards: WeightedRewards, device: torch.device
) -> PreTrainedModel:
    if config.critic.init == "policy":
        return models.critic_from(policy, layers=config.layers)
    if config.critic.init == "reward":
        place = next(i for i, r in enumerate(config.rewards) if r.kind == "model")
        reward: Any = rewards.rewards[place]
        require(
            reward.tokenizer is None and models.is_decoder(reward.model),
            "critic.init = 'reward' needs a reward model that reads the policy's tokens from left to right, but "
            f"{reward.name!r} has a tokenizer of its own or is an encoder: use 'policy' or a checkpoint",
        )
        critic = models.critic_from(reward.model, label=reward.label, layers=config.layers)
        return models.to_device(critic, device)  # the reward model may be in host memory
    critic = models.load_critic(
        config.critic.init,
        config.policy.dtype,
        layers=config.layers,
        trust_remote_code=config.policy.trust_remote_code,
    )
    return models.to_device(critic, device)
