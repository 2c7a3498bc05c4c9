"""Every knob of a run, with its unit and its legal range; those of models, prompts and rewards are in config_inputs,
of sharing in config_memory, of layers in config_layers, of offloading in config_offload, of optimizers in
config_optimizer, of the objective in config_ppo.

Defaults are those of the TL;DR runs of "The N+ Implementation Details of RLHF with PPO" (arXiv:2403.17031), named N+
below; what differs from them says so.
"""

from dataclasses import dataclass, field
from typing import Literal

from fastppo.checks import require, require_positive
from fastppo.config_inputs import CriticConfig, DataConfig, ModelConfig, RewardConfig
from fastppo.config_layers import LayersConfig
from fastppo.config_memory import MemoryConfig
from fastppo.config_offload import OffloadConfig
from fastppo.config_optimizer import OptimizerConfig
from fastppo.config_ppo import GROUPED, PPOConfig
from fastppo.config_vllm import VLLMConfig
from fastppo.config_watch import WatchConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    """Sampling. There is no top-k or top-p here: PPO needs the log-prob of what was drawn under what is trained."""

    num_prompts: int = 512
    """Prompts per PPO iteration, over all ranks."""
    samples_per_prompt: int = 1
    """Responses to each prompt; the group estimators compare them and need at least 2."""
    temperature: float = 0.7
    """Logits are divided by it when sampling and when scoring."""
    max_new_tokens: int = 53
    """Longest response, in tokens; see ppo.truncation for what becomes of one that is cut."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a response, beside the model's own end-of-sequence tokens."""
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    """Token ids one after the other that end a response; it keeps them."""
    engine: Literal["embedded", "generate_batch", "vllm"] = "embedded"
    """Who samples: fastppo's own engine or transformers' continuous batching, both on the weights as they are, or vLLM
    servers, which get a copy after every update."""
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    """With engine = "vllm"."""
    one_step_off: bool = False
    """With vLLM: sample for the next iteration while this one updates, from the weights before that update; needs
    ppo.importance_cap."""
    max_rows: int = 512
    """Sequences decoded at a time; with vLLM, requests in flight."""
    kv_gib: float | None = None
    """GiB for their keys and values; where max_rows do not fit, fewer are decoded at a time. None: on a GPU half of
    what is free, on a CPU no limit."""
    cuda_graphs: bool = True
    """On a GPU, the embedded engine replays its decode steps as CUDA graphs; False: it launches them one by one."""
    keep_memory: bool = False
    """The embedded engine keeps the memory of keys and values, and its graphs, for the next rollout: quicker, but the
    update has that much less."""
    old_logprobs: Literal["auto", "sampler", "recompute"] = "auto"
    """Where the log-probs of the behaviour policy come from: the sampler, or a forward of the trainer.
    `auto`: the sampler when it runs this module in float32 (the gap is rounding), else the trainer. `sampler` costs no
    forward; a gap is then part of the ratio, which the objective clips, and gets no weights of its own."""
    gap_stop: float | None = None
    """Mean gap between the sampler's log-probs and the trainer's, in nats per token, over which a run stops: the
    sampler has other weights, another temperature or another arithmetic. None: 1e-3 for float32 weights, else 0.05."""
    gap_correct: float | None = None
    """Gap over which tokens of an engine that does not run this module in float32 get truncated importance weights,
    with a cap of 2 unless ppo.importance_cap says another. None: 1e-4 for float32 weights, else 1e-3."""
    gap_response_factor: float = 10.0
    """The mean gap of any single response may be this many times gap_correct and gap_stop. One of fewer than 16 tokens
    counts as one of 16."""

    def __post_init__(self) -> None:
        require_positive("rollout", self, "num_prompts", "samples_per_prompt", "max_new_tokens", "gap_response_factor")
        require_positive("rollout", self, "temperature", "max_rows", "kv_gib", "gap_stop", "gap_correct")
        require(all(self.stop_sequences), f"a stop sequence has at least one token, got {self.stop_sequences}")
        require(
            not (self.one_step_off and self.vllm.sleep),
            "rollout.one_step_off samples during the update, when servers with rollout.vllm.sleep sleep: choose one",
        )
        require(
            not self.one_step_off or self.engine == "vllm",
            f"rollout.one_step_off samples while the policy changes, which only servers can: engine must be 'vllm', "
            f"got {self.engine!r}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Length of the run and what it writes."""

    total_steps: int = 1000
    """PPO iterations: rollout, score, update."""
    eval_every: int = 50
    """Iterations between evaluations; there is one before the first and one after the last."""
    eval_prompts_max: int = 256
    """Held-out prompts that an evaluation uses, the first of the file."""
    eval_greedy: bool = False
    """Evaluate the most probable tokens; False: sample as in training. Either way every evaluation draws alike."""
    save_every: int = 50
    """Iterations between checkpoints; 0: only the final one, and nothing survives what cannot be caught."""
    keep_last: int = 2
    """Of the checkpoints that save_every makes, how many of the last stay on disk; 0: all."""
    keep_best: bool = False
    """Keep the state after the evaluation with the highest eval/scores too, as checkpoints/best."""
    async_save: bool = True
    """Write checkpoints beside training, from a copy in host memory; False: training waits, and nothing is copied."""
    keep_rollouts: bool = True
    """Keep the finished rollout that follows a checkpoint, and its scores: a run that goes on from there takes it. Not
    with rollout.one_step_off, where the one after it has begun."""
    loggers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Beside metrics.jsonl, which is always written."""

    def __post_init__(self) -> None:
        require_positive("train", self, "total_steps", "eval_every", "eval_prompts_max")
        for name in ("save_every", "keep_last"):
            require(getattr(self, name) >= 0, f"train.{name} must be >= 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A whole run: what `fastppo train RUN.toml` reads."""

    policy: ModelConfig
    data: DataConfig
    rewards: tuple[RewardConfig, ...]
    critic: CriticConfig = field(default_factory=CriticConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    policy_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    critic_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    layers: LayersConfig = field(default_factory=LayersConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    out: str = "runs/ppo"
    """Run folder: config.json, metrics.jsonl, samples.jsonl, checkpoints/."""
    seed: int = 1
    """Of sampling, prompt order and minibatches."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a GPU where there is one."""
    deterministic: bool = False
    """Only operations that give the same bits every time; slower on a GPU, where one that cannot is an error."""
    watch: WatchConfig = field(default_factory=WatchConfig)

    def __post_init__(self) -> None:
        require(len(self.rewards) > 0, "rewards is empty: give at least one [[rewards]] table with kind and target")
        require(0 <= self.seed < 2**62, f"seed must be in [0, 2**62), got {self.seed}")
        names = [r.log_name for r in self.rewards]
        require(len(set(names)) == len(names), f"rewards need different names, got {names}: set rewards.name")
        sequences = self.rollout.num_prompts * self.rollout.samples_per_prompt
        divisor = next(d for d in range(min(sequences, self.ppo.num_minibatches), 0, -1) if sequences % d == 0)
        require(
            sequences % self.ppo.num_minibatches == 0,
            f"ppo.num_minibatches ({self.ppo.num_minibatches}) must divide the sequences of a rollout ({sequences} = "
            f"rollout.num_prompts * rollout.samples_per_prompt); the nearest smaller divisor is {divisor}",
        )
        require(
            self.ppo.advantage not in GROUPED or self.rollout.samples_per_prompt >= 2,
            f"ppo.advantage = {self.ppo.advantage!r} compares samples of one prompt: rollout.samples_per_prompt "
            f"must be >= 2, got {self.rollout.samples_per_prompt}",
        )
        require(
            not self.train.keep_best or self.data.eval_prompts is not None,
            "train.keep_best goes by eval/scores: set data.eval_prompts",
        )
        self.offload.check(self)
        self.watch.check_judge(names, has_evaluation=self.data.eval_prompts is not None)
        has_model = any(r.kind == "model" for r in self.rewards)
        require(
            self.critic.init != "reward" or has_model,
            "critic.init = 'reward' needs a reward of kind 'model', got none; use 'policy' or a checkpoint",
        )
        require(
            not self.rollout.one_step_off or self.ppo.importance_cap is not None,
            "rollout.one_step_off trains on responses of the policy before the last update: set ppo.importance_cap, "
            "the truncation of the weights that correct for it, e.g. 2",
        )
        require(
            self.memory.share == "none" or self.critic.init == "policy",
            f"memory.share = 'lora' makes the critic an adapter on the policy's base, so critic.init must be 'policy', "
            f"got {self.critic.init!r}",
        )
        rounds = "stochastic" in (self.policy_optimizer.masters, self.critic_optimizer.masters)
        require(
            not rounds or (self.policy.dtype == "bfloat16" and self.memory.share == "none"),
            "optimizer masters = 'stochastic' rounds bfloat16 weights that train: it needs policy.dtype = 'bfloat16' "
            f"and memory.share = 'none', got {self.policy.dtype!r} and {self.memory.share!r}",
        )
        require(
            self.ppo.importance_cap is None or self.rollout.old_logprobs != "sampler",
            "ppo.importance_cap compares the trainer's log-probs with the sampler's: rollout.old_logprobs must be "
            "'recompute' or 'auto', got 'sampler'",
        )
