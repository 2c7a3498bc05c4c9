"""Small PPO runs of four models, planned from their config and measured: one iteration after the optimizers' first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from memory_profile import MemoryProfile, Use
from transformers import Qwen2Config

from fastppo import PPOEngine, Prompts, RewardModel, RunConfig, WeightedRewards, models
from fastppo.memory.plan import Plan, make_plan
from fastppo.memory.setting import setting_of
from fastppo.offload.roles import of_frozen
from fastppo.run_file import from_dict

PROMPT_TOKENS = 32


@dataclass(frozen=True)
class Case:
    """What differs between runs; the rest is in `config`."""

    name: str
    vocab_size: int = 4096
    dtype: str = "float32"
    checkpointing: bool = False
    max_tokens: int = 256
    num_minibatches: int = 2
    tied: bool = False
    share: str = "none"
    optimizer: str = "adamw"
    masters: str = "float32"
    offload: tuple[tuple[str, str], ...] = ()


MOVED = tuple((key, "move") for key in ("reference", "reward", "critic", "critic_optimizer", "policy_optimizer"))
CASES = (
    Case("full"),
    Case("full, vocabulary 20000", vocab_size=20000),
    Case("full, checkpointing", checkpointing=True),
    Case("full, bfloat16, one micro-batch", dtype="bfloat16", max_tokens=1024, num_minibatches=1),
    Case("full, bfloat16, vocabulary 20000, checkpointing", vocab_size=20000, dtype="bfloat16", checkpointing=True),
    Case("full, tied embeddings", vocab_size=20000, tied=True),
    Case("lora", share="lora"),
    Case("lora, bfloat16, vocabulary 20000, checkpointing", 20000, "bfloat16", checkpointing=True, share="lora"),
    Case("full, 8-bit", optimizer="adamw-8bit"),
    Case("full, bfloat16, 8-bit, stochastic rounding", 20000, "bfloat16", optimizer="adamw-8bit", masters="stochastic"),
    Case("full, bfloat16, everything moves", dtype="bfloat16", offload=MOVED),
    Case("full, reference and reward stream", offload=(*MOVED[2:], ("reference", "stream"), ("reward", "stream"))),
)


def shape(case: Case) -> Qwen2Config:
    """A Qwen2 of 3 layers."""
    made = Qwen2Config(
        vocab_size=case.vocab_size,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=case.tied,
        architectures=["Qwen2ForCausalLM"],
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    made.num_labels = 1
    return made


def config(case: Case, folder: Path) -> RunConfig:
    """The run; the policy's config.json is written into `folder`."""
    shape(case).save_pretrained(folder)
    tables: dict[str, Any] = {
        "policy": {"path": str(folder), "dtype": case.dtype, "gradient_checkpointing": case.checkpointing},
        "critic": {"gradient_checkpointing": case.checkpointing},
        "memory": {"share": case.share},
        "policy_optimizer": {"kind": case.optimizer, "masters": case.masters},
        "critic_optimizer": {"kind": case.optimizer, "masters": case.masters},
        "data": {"prompts": "none.jsonl", "max_prompt_tokens": PROMPT_TOKENS},
        "rewards": [{"kind": "model", "target": str(folder), "dtype": case.dtype}],
        "rollout": {"num_prompts": 8, "max_new_tokens": 16, "temperature": 1.0},
        "ppo": {"num_epochs": 1, "num_minibatches": case.num_minibatches, "max_tokens_per_microbatch": case.max_tokens},
        "device": "cpu",
        "offload": dict(case.offload),
    }
    return from_dict(RunConfig, tables)


def planned(run: RunConfig) -> Plan:
    """From config.json alone."""
    return make_plan(setting_of(run, torch.device("cpu")))


def build(run: RunConfig, case: Case, device: str = "cpu") -> tuple[PPOEngine, WeightedRewards]:
    """The four models, with random weights."""
    checkpointing = run.policy.gradient_checkpointing
    policy = models.to_device(models.new_causal_lm(shape(case), run.policy.dtype), torch.device(device))
    policy = models.prepare_policy(policy, gradient_checkpointing=checkpointing)
    reward = RewardModel(models.frozen(models.reward_model_from(policy)))
    policy = models.adapt(policy, run.memory) if case.share == "lora" else policy
    engine = PPOEngine(
        policy,
        critic=models.critic_from(policy, gradient_checkpointing=checkpointing),
        ppo=run.ppo,
        rollout=run.rollout,
        policy_optimizer=run.policy_optimizer,
        critic_optimizer=run.critic_optimizer,
        offload=run.offload,
    )
    reward.weights_at = of_frozen(reward.model, run.offload.reward, policy.device)
    return engine, WeightedRewards([reward])


def measured(run: RunConfig, case: Case) -> dict[str, Use]:
    """By phase: what PyTorch's CPU allocator had handed out."""
    prompts = prompts_of(run)
    with MemoryProfile() as profile:
        with profile.phase("load"):
            engine, rewards = build(run, case)
        for _ in range(2):
            with profile.phase("rollout"):
                rollout = engine.generate(prompts)
            with profile.phase("reward"):
                scores = rewards(rollout)
            with profile.phase("score"):
                experience = engine.score(rollout, scores)
            with profile.phase("update"):
                engine.update(experience)
    return profile.phases


def measured_on_gpu(run: RunConfig, case: Case) -> dict[str, int]:
    """The largest max_memory_allocated of each phase of two iterations."""
    peaks: dict[str, int] = {}
    engine, rewards = build(run, case, "cuda")
    for _ in range(2):
        rollout = _peak_of("rollout", peaks, lambda: engine.generate(prompts_of(run)))
        scores = _peak_of("reward", peaks, lambda rollout=rollout: rewards(rollout))
        experience = _peak_of("score", peaks, lambda r=rollout, s=scores: engine.score(r, s))
        _peak_of("update", peaks, lambda experience=experience: engine.update(experience))
    return peaks


def reserved_on_gpu(run: RunConfig, case: Case, iterations: int) -> list[int]:
    """Bytes that the caching allocator holds after each iteration."""
    engine, rewards = build(run, case, "cuda")
    held = []
    for _ in range(iterations):
        rollout = engine.generate(prompts_of(run))
        engine.update(engine.score(rollout, rewards(rollout)))
        held.append(torch.cuda.memory_reserved())
    return held


def prompts_of(run: RunConfig) -> Prompts:
    """As many as an iteration takes, of equal length."""
    return Prompts(token_ids=tuple(tuple(range(i, i + PROMPT_TOKENS)) for i in range(run.rollout.num_prompts)))


def _peak_of(name: str, peaks: dict[str, int], call: Callable[[], Any]) -> Any:
    torch.cuda.reset_peak_memory_stats()
    out = call()
    peaks[name] = max(peaks.get(name, 0), torch.cuda.max_memory_allocated())
    return out
