"""The one PPO setting that the scripts of this folder run: model shape, seeds, prompts and PPO numbers.

They are run as files, by the interpreter of the system that each is for, so nothing here needs fastppo.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass, replace

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification


@dataclass(frozen=True)
class PPOSetting:
    """Numbers shared by the systems under comparison; the defaults are the benchmark."""

    hidden_size: int = 128
    layers: int = 4
    attention_heads: int = 4
    kv_heads: int = 2
    intermediate_size: int = 512
    vocab_size: int = 16384
    max_positions: int = 256

    prompts: int = 64
    prompt_tokens: int = 16
    response_tokens: int = 48
    temperature: float = 1.0

    batch_size: int = 64
    ppo_epochs: int = 2
    minibatches: int = 4
    learning_rate: float = 3e-6
    adam_eps: float = 1e-8
    gamma: float = 1.0
    lam: float = 0.95
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    kl_coef: float = 0.05
    value_coef: float = 0.1

    threads: int = 2
    policy_seed: int = 0
    value_seed: int = 1
    reward_seed: int = 2
    prompt_seed: int = 3
    sampling_seed: int = 4

    @property
    def optimizer_steps_per_iteration(self) -> int:
        """One optimizer step for each minibatch of each epoch."""
        return self.ppo_epochs * self.minibatches


SETTING = PPOSetting()
SMALL = replace(SETTING, hidden_size=64, intermediate_size=256, layers=2, vocab_size=64)
# Here the reward moves within 20 iterations.
LEARNING = replace(SMALL, prompt_tokens=4, response_tokens=8, learning_rate=1e-3, kl_coef=0.01)
QUICK = replace(SMALL, prompts=8, batch_size=8, response_tokens=8)
SETTINGS = {"speed": SETTING, "learning": LEARNING, "quick": QUICK}


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that every script has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--iterations", type=int, default=4, help="PPO iterations; the first is a warm-up")
    made.add_argument("--setting", choices=SETTINGS, default="speed")
    made.add_argument("--sampling-seed", type=int, default=SETTING.sampling_seed)
    made.add_argument("--threads", type=int, default=SETTING.threads)
    return made


def setting_of(options: argparse.Namespace) -> PPOSetting:
    """The setting that is named, with what the options change."""
    return replace(SETTINGS[options.setting], sampling_seed=options.sampling_seed, threads=options.threads)


@dataclass
class PPOModels:
    """The four models of a PPO run."""

    policy: Qwen2ForCausalLM
    reference: Qwen2ForCausalLM
    value: Qwen2ForSequenceClassification
    reward: Qwen2ForSequenceClassification


def model_config(setting: PPOSetting = SETTING) -> Qwen2Config:
    """A fresh config per model, because trainers edit the configs they are handed."""
    config = Qwen2Config(
        hidden_size=setting.hidden_size,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.attention_heads,
        num_key_value_heads=setting.kv_heads,
        intermediate_size=setting.intermediate_size,
        vocab_size=setting.vocab_size,
        max_position_embeddings=setting.max_positions,
        tie_word_embeddings=True,
        # No end token: every response runs to its full length in every system.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        dtype="float32",
    )
    config.num_labels = 1
    return config


def build_policy(setting: PPOSetting = SETTING) -> Qwen2ForCausalLM:
    """The randomly initialised policy."""
    torch.manual_seed(setting.policy_seed)
    return Qwen2ForCausalLM(model_config(setting))


def build_scorer(seed: int, setting: PPOSetting = SETTING) -> Qwen2ForSequenceClassification:
    """A value or reward model: the policy's body shape with a one-number head."""
    torch.manual_seed(seed)
    return Qwen2ForSequenceClassification(model_config(setting))


def build_models(setting: PPOSetting = SETTING) -> PPOModels:
    """All four models in evaluation mode; reference and reward model take no gradient."""
    policy = build_policy(setting).eval()
    reference = copy.deepcopy(policy).requires_grad_(False)
    value = build_scorer(setting.value_seed, setting).eval()
    reward = build_scorer(setting.reward_seed, setting).eval().requires_grad_(False)
    return PPOModels(policy=policy, reference=reference, value=value, reward=reward)


def build_prompts(setting: PPOSetting = SETTING) -> torch.Tensor:
    """Random prompt tokens, `[prompts, prompt_tokens]`, all of one length so that no system pads."""
    generator = torch.Generator().manual_seed(setting.prompt_seed)
    return torch.randint(setting.vocab_size, (setting.prompts, setting.prompt_tokens), generator=generator)
