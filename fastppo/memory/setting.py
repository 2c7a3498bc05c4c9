"""A run's config, as a plan sees it: shapes of its models, from config.json alone, and the data of an iteration."""

import re
from typing import Any

import torch

from fastppo import models
from fastppo.checks import InputError, require
from fastppo.config import RunConfig
from fastppo.config_inputs import RewardConfig
from fastppo.memory.passes import Model
from fastppo.memory.plan import Setting, Work
from fastppo.models.outline import Kind

UNITS = {"GB": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20}


def setting_of(
    config: RunConfig,
    device: torch.device,
    *,
    prompt_tokens: int | None = None,
    world_size: int = 1,
    evaluation: tuple[int, int] | None = None,
) -> Setting:
    """What is planned for one rank.

    Args:
        prompt_tokens: of the longest prompt; None: data.max_prompt_tokens, or what the context leaves for one.
        evaluation: held-out prompts, tokens of the longest; None: train.eval_prompts_max, and as for the prompts.

    Raises:
        ValueError: the config of a model cannot be read, responses leave no room for a prompt in the policy's context,
            or `offload.reward` is about adapters alone.
    """
    require(
        config.offload.reward == "keep" or has_full_reward(config),
        f"offload.reward = {config.offload.reward!r} needs a reward model with weights of its own, and this run's are "
        "adapters on the policy's base: set it to 'keep'",
    )
    learns = {"optimizer": config.policy_optimizer, "memory": config.memory, "layers": config.layers}
    policy = _model(config.policy.path, "policy", config, device, **learns)
    response, context = config.rollout.max_new_tokens, models.context_of(policy.config)
    require(
        response < context,
        f"rollout.max_new_tokens = {response} leaves no room for a prompt in the policy's context of {context}: "
        "lower it",
    )
    return Setting(
        policy=policy,
        critic=_critic(config, device),
        reference=_reference(config, device),
        rewards=tuple((_reward(r, config, device), r.batch_size) for r in _reward_models(config)),
        work=_work(config, prompt_tokens, context - response, world_size, evaluation),
        roll_back=config.ppo.roll_back,
        offload=config.offload,
        copies_to_save=config.train.async_save and (config.train.save_every > 0 or config.train.keep_best),
    )


def has_full_reward(config: RunConfig) -> bool:
    """Whether a reward model has weights of its own; adapters on the policy's base have none to send away."""
    return any(not models.is_saved_adapter(r.target) for r in _reward_models(config))


def parse_size(text: str) -> int:
    """Bytes of "24GB" (10^9 each), "23.5GiB" (2^30), MB or MiB.

    Raises:
        ValueError: it is no such size.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(GB|GiB|MB|MiB)\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise InputError(f"a size of memory is a number with GB, GiB, MB or MiB, as in 24GB, got {text!r}")
    return int(float(found[1]) * UNITS[found[2].upper()])


def _work(
    config: RunConfig, prompt_tokens: int | None, room: int, world_size: int, evaluation: tuple[int, int] | None
) -> Work:
    """`room`: what the context leaves for a prompt."""
    evaluates, most = config.data.eval_prompts is not None, min(config.data.max_prompt_tokens, room)
    few, longest = evaluation or (config.train.eval_prompts_max * evaluates, most * evaluates)
    rollout, sequences = config.rollout, config.rollout.num_prompts * config.rollout.samples_per_prompt // world_size
    work = Work(
        sequences=sequences,
        minibatch=-(-sequences // config.ppo.num_minibatches),
        prompt=prompt_tokens or most,
        response=rollout.max_new_tokens,
        max_tokens=config.ppo.max_tokens_per_microbatch,
        max_rows=rollout.max_rows,
        kv_bytes=None if rollout.kv_gib is None else int(rollout.kv_gib * 2**30),
        eval_sequences=min(few, config.train.eval_prompts_max),
        eval_prompt=longest,
        embedded=rollout.engine != "vllm",
        keeps_kv=rollout.keep_memory and rollout.engine == "embedded",
        graphs=rollout.cuda_graphs and rollout.engine == "embedded",
        servers=rollout.vllm.portion if rollout.engine == "vllm" else 0.0,
        servers_sleep=rollout.vllm.sleep,
    )
    require(
        work.longest <= work.max_tokens,
        f"a prompt of {work.prompt} tokens and rollout.max_new_tokens make {work.longest}, more than "
        f"ppo.max_tokens_per_microbatch = {work.max_tokens}: raise it to at least that",
    )
    return work


def _model(path: str, kind: Kind, config: RunConfig, device: torch.device, **others: Any) -> Model:
    shape = models.read_config(path, config.policy.trust_remote_code)
    return Model(**{"config": shape, "kind": kind, "dtype": config.policy.dtype, "device": device, **others})


def _critic(config: RunConfig, device: torch.device) -> Model | None:
    if config.ppo.advantage != "gae":
        return None
    learns = {"optimizer": config.critic_optimizer, "memory": config.memory, "layers": config.layers}
    if config.critic.init == "reward":  # it stays in the dtype that model has
        reward = _reward_models(config)[0]
        return _model(reward.target, "critic", config, device, dtype=reward.dtype, **learns)
    path = config.policy.path if config.critic.init == "policy" else config.critic.init
    return _model(path, "critic", config, device, **learns)


def _reference(config: RunConfig, device: torch.device) -> Model | None:
    """None too where it is the base that the adapters are on: scoring under the policy takes as much."""
    if config.ppo.kl_coef == 0 or (config.memory.share == "lora" and config.policy.reference is None):
        return None
    return _model(config.policy.reference or config.policy.path, "policy", config, device)


def _reward(reward: RewardConfig, config: RunConfig, device: torch.device) -> Model:
    if models.is_saved_adapter(reward.target):
        return _model(config.policy.path, "reward", config, device, memory=config.memory)
    return _model(reward.target, "reward", config, device, dtype=reward.dtype)


def _reward_models(config: RunConfig) -> list[RewardConfig]:
    return [r for r in config.rewards if r.kind == "model"]
