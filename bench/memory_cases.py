"""Small PPO runs of four models, planned from their config and measured: one iteration after the optimizers' first."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from memory_profile import MemoryProfile, Use
from transformers import PreTrainedModel, Qwen2Config

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
    checkpointing: str = "none"
    every: int = 1
    fused: str = "none"
    max_tokens: int = 256
    num_minibatches: int = 2
    tied: bool = False
    share: str = "none"
    optimizer: str = "adamw"
    masters: str = "float32"
    keep_memory: bool = False
    reward_adapter: bool = False
    hidden_size: int = 128
    num_layers: int = 3
    offload: tuple[tuple[str, str], ...] = ()
    lengths: tuple[int, ...] = (PROMPT_TOKENS,) * 8
    """Tokens of the prompts of an iteration."""
    evaluated: int = 0
    """Held-out prompts."""
    roll_back: bool = False


MOVED = tuple((key, "move") for key in ("reference", "reward", "critic", "critic_optimizer", "policy_optimizer"))
CASES = (
    Case("full"),
    Case("full, vocabulary 20000", vocab_size=20000),
    Case("full, checkpointing", checkpointing="full"),
    Case("full, bfloat16, one micro-batch", dtype="bfloat16", max_tokens=1024, num_minibatches=1),
    Case("full, bfloat16, vocabulary 20000, checkpointing", vocab_size=20000, dtype="bfloat16", checkpointing="full"),
    Case("full, tied embeddings", vocab_size=20000, tied=True),
    Case("lora", share="lora"),
    Case("lora, bfloat16, vocabulary 20000, checkpointing", 20000, "bfloat16", checkpointing="full", share="lora"),
    Case("full, 8-bit", optimizer="adamw-8bit"),
    Case("full, bfloat16, 8-bit, stochastic rounding", 20000, "bfloat16", optimizer="adamw-8bit", masters="stochastic"),
    Case("full, bfloat16, everything moves", dtype="bfloat16", offload=MOVED),
    Case("full, reference and reward stream", offload=(*MOVED[2:], ("reference", "stream"), ("reward", "stream"))),
    Case("full, every second layer", checkpointing="full", every=2, max_tokens=1024, num_minibatches=1),
    Case("full, selective", checkpointing="selective", max_tokens=1024, num_minibatches=1),
    Case("lora, selective", checkpointing="selective", max_tokens=1024, num_minibatches=1, share="lora"),
    Case("full, keys and values kept", keep_memory=True),
    Case("full, evaluation of 64 prompts", evaluated=64),
    Case("full, four minibatches, roll-back", num_minibatches=4, roll_back=True),
    Case("full, layers in C++", fused="native"),  # a plan takes them for the modules, which keep more
    Case("full, layers in C++, checkpointing", fused="native", checkpointing="full"),
)
UNEVEN = (  # a plan takes every prompt to be as long as the longest: it may be above what is measured, never below
    Case("lora, uneven", 512, max_tokens=500, num_minibatches=1, share="lora", num_layers=4, lengths=(239, *[84] * 15)),
    Case("full, uneven, one micro-batch", max_tokens=1024, num_minibatches=1, lengths=(32, 31, 30, 32, 29, 32, 31, 30)),
)


def shape(case: Case) -> Qwen2Config:
    """A Qwen2, its proportions those of the 0.5B one."""
    made = Qwen2Config(
        vocab_size=case.vocab_size,
        hidden_size=case.hidden_size,
        intermediate_size=11 * case.hidden_size // 4,
        num_hidden_layers=case.num_layers,
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
    evaluates = {"eval_prompts": "none.jsonl"} if case.evaluated else {}
    drift = {"target_kl": 1e9, "roll_back": True} if case.roll_back else {}
    tables: dict[str, Any] = {
        "policy": {"path": str(folder), "dtype": case.dtype},
        "layers": {"checkpointing": case.checkpointing, "checkpoint_every": case.every, "fused": case.fused},
        "memory": {"share": case.share},
        "policy_optimizer": {"kind": case.optimizer, "masters": case.masters},
        "critic_optimizer": {"kind": case.optimizer, "masters": case.masters},
        "data": {"prompts": "none.jsonl", "max_prompt_tokens": max(case.lengths), **evaluates},
        "rewards": [{"kind": "model", "target": str(folder), "dtype": case.dtype}],
        "rollout": {
            **{"num_prompts": len(case.lengths), "max_new_tokens": 16, "temperature": 1.0},
            **{"keep_memory": case.keep_memory, "cuda_graphs": False},
        },
        "ppo": {
            "num_epochs": 1,
            "num_minibatches": case.num_minibatches,
            "max_tokens_per_microbatch": case.max_tokens,
            **drift,
        },
        "train": {"async_save": False, "eval_prompts_max": max(1, case.evaluated)},  # nothing is saved here
        "device": "cpu",
        "offload": dict(case.offload),
    }
    return from_dict(RunConfig, tables)


def planned(run: RunConfig, device: str = "cpu") -> Plan:
    """From config.json alone."""
    return make_plan(setting_of(run, torch.device(device)))


def build(run: RunConfig, case: Case, device: str = "cpu") -> tuple[PPOEngine, WeightedRewards]:
    """The four models, with random weights."""
    policy = models.to_device(models.new_causal_lm(shape(case), run.policy.dtype), torch.device(device))
    policy = models.prepare_policy(policy, layers=run.layers)
    reward = None if case.reward_adapter else models.frozen(models.reward_model_from(policy))
    policy = models.adapt(policy, run.memory) if case.share == "lora" else policy
    engine = PPOEngine(
        policy,
        critic=models.critic_from(policy, layers=run.layers),
        ppo=run.ppo,
        rollout=run.rollout,
        policy_optimizer=run.policy_optimizer,
        critic_optimizer=run.critic_optimizer,
        offload=run.offload,
    )
    for model in (engine.policy, engine.critic, engine.reference):
        if model is not None:
            models.fuse_layers(model, run.layers, torch.device(device))
    scores = RewardModel(reward or _reward_on(policy))
    scores.weights_at = of_frozen(scores.model, run.offload.reward, policy.device)
    return engine, WeightedRewards([scores])


def _reward_on(policy: PreTrainedModel) -> PreTrainedModel:
    """A reward model that is an adapter on the policy's base, by way of peft's files."""
    import peft

    settings = peft.LoraConfig(r=16, task_type="SEQ_CLS", target_modules="all-linear")
    with tempfile.TemporaryDirectory() as folder:
        peft.get_peft_model(models.reward_model_from(models.bare(policy)), settings).save_pretrained(folder)
        return models.load_reward_model(folder, base=policy)


def peaks(run: RunConfig, case: Case, device: str = "cpu") -> dict[str, int]:
    """The most bytes of each phase of two iterations, by the device's own allocator."""
    if device == "cuda":
        return measured_on_gpu(run, case)
    return {name: use.peak for name, use in measured(run, case).items()}


def measured(run: RunConfig, case: Case) -> dict[str, Use]:
    """By phase: what PyTorch's CPU allocator had handed out."""
    prompts = prompts_of(case)
    rollout = experience = None
    gc.collect()  # what is left of a run before would be freed within the profile
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
        if case.evaluated:
            rollout = experience = None
            with profile.phase("rollout"):
                rollout = engine.generate(held_out(case), replace(engine.sampling, seed=1))
            with profile.phase("reward"):
                rewards(rollout)
    return profile.phases


def measured_on_gpu(run: RunConfig, case: Case) -> dict[str, int]:
    """The largest max_memory_allocated of each phase of two iterations, beside what was allocated before."""
    found: dict[str, int] = {}
    x = torch.ones(8, 8, device="cuda")
    torch.nn.functional.linear(x, x, x[0])  # cuBLAS's workspace stays; a plan counts it beside the tensors
    before = torch.cuda.memory_allocated()
    engine, rewards = _peak_of("load", found, lambda: build(run, case, "cuda"))
    for _ in range(2):
        rollout = _peak_of("rollout", found, lambda: engine.generate(prompts_of(case)))
        scores = _peak_of("reward", found, lambda rollout=rollout: rewards(rollout))
        experience = _peak_of("score", found, lambda r=rollout, s=scores: engine.score(r, s))
        _peak_of("update", found, lambda experience=experience: engine.update(experience))
    if case.evaluated:
        rollout = _peak_of("rollout", found, lambda: engine.generate(held_out(case), replace(engine.sampling, seed=1)))
        _peak_of("reward", found, lambda: rewards(rollout))
    return {name: peak - before for name, peak in found.items()}


def reserved_on_gpu(run: RunConfig, case: Case, iterations: int) -> list[int]:
    """Bytes that the caching allocator holds after each iteration."""
    engine, rewards = build(run, case, "cuda")
    held = []
    for _ in range(iterations):
        rollout = engine.generate(prompts_of(case))
        engine.update(engine.score(rollout, rewards(rollout)))
        held.append(torch.cuda.memory_reserved())
    return held


def prompts_of(case: Case) -> Prompts:
    """As many as an iteration takes."""
    return Prompts(token_ids=tuple(tuple(range(i, i + length)) for i, length in enumerate(case.lengths)))


def held_out(case: Case) -> Prompts:
    """Of an evaluation."""
    return Prompts(token_ids=tuple(tuple(range(i, i + max(case.lengths))) for i in range(case.evaluated)))


def _peak_of(name: str, peaks: dict[str, int], call: Callable[[], Any]) -> Any:
    torch.cuda.reset_peak_memory_stats()
    out = call()
    peaks[name] = max(peaks.get(name, 0), torch.cuda.max_memory_allocated())
    return out
