"""Every knob of a run, with its unit and its legal range; those of models, prompts and rewards are in config_inputs,
of sharing in config_memory, of layers in config_layers, of offloading in config_offload, of optimizers in
config_optimizer.

Defaults are those of the TL;DR runs of "The N+ Implementation Details of RLHF with PPO" (arXiv:2403.17031), named N+
below; what differs from them says so.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from fastppo.checks import require, require_positive, require_unit
from fastppo.config_inputs import CriticConfig, DataConfig, ModelConfig, RewardConfig
from fastppo.config_layers import LayersConfig
from fastppo.config_memory import MemoryConfig
from fastppo.config_offload import OffloadConfig
from fastppo.config_optimizer import OptimizerConfig
from fastppo.config_vllm import VLLMConfig
from fastppo.config_watch import WatchConfig

AdvantageEstimator = Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce++"]
Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant"]
KLEstimator = Literal["k1", "k2", "k3", "k1+", "k3+"]
Truncation = Literal["none", "penalty", "bootstrap", "mask"]

GROUPED: tuple[AdvantageEstimator, ...] = ("grpo", "dr_grpo", "rloo")


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
class PPOConfig:
    """The objective (Schulman et al. 2017, arXiv:1707.06347) and what surrounds it."""

    num_epochs: int = 4
    """Passes over each rollout batch."""
    num_minibatches: int = 1
    """Optimizer steps per pass; must divide the sequences of a rollout."""
    max_tokens_per_microbatch: int = 16384
    """Tokens per forward; bounds memory, changes no result."""
    clip_low: float = 0.2
    """The ratio is clipped at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped at 1 + clip_high (clip-higher, arXiv:2503.14476, when larger than clip_low)."""
    dual_clip: float | None = None
    """c > 1: for negative advantages the loss is at most -c * advantage (arXiv:1912.09729)."""
    objective: Literal["clip", "kl-penalty"] = "clip"
    """`kl-penalty`: no clipping, but old_kl_coef * KL(old || new), adapted after every update (PPO paper, eq. 8)."""
    old_kl_coef: float = 1.0
    """Initial coefficient of the kl-penalty objective."""
    old_kl_target: float = 0.01
    """Nats per token that the kl-penalty objective adapts to."""
    value_clip: float | None = 0.2
    """Values move at most this far from the old ones in the value loss; None: no clipping."""
    value_coef: float = 0.1
    """Weight of the value loss. The critic has its own Adam, so it acts through eps and max_grad_norm only."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus in the policy loss; 0: none."""
    gamma: float = 1.0
    """Discount per token, in [0, 1]."""
    lam: float = 0.95
    """GAE's lambda; without a critic it has no part."""
    advantage: AdvantageEstimator = "gae"
    """Estimator: `gae` has a critic; grpo, dr_grpo and rloo compare samples of one prompt; `reinforce++` whitens."""
    whiten_advantages: bool = True
    """For gae and reinforce++; the group estimators are normalised by their groups."""
    whiten_rewards: bool = False
    """Divide per-token rewards by their standard deviation (their mean is kept)."""
    normalize_scores: bool = False
    """Subtract the running mean of the scores and divide by their running standard deviation."""
    clip_scores: float | None = None
    """Scores are clamped to [-clip_scores, clip_scores], after normalisation."""
    truncation: Truncation = "penalty"
    """A response cut by max_new_tokens: gets `missing_eos_score`; is bootstrapped with V of its last state; is left
    out of the loss (mask); or nothing special."""
    missing_eos_score: float = -1.0
    """With truncation `penalty`, the score that a cut response gets instead of its own."""
    kl_coef: float = 0.05
    """Weight of the KL to the reference, in reward units per nat."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL to the reference acts: taken from the reward of each token, or added to the policy loss."""
    kl_estimator: KLEstimator = "k1"
    """k1 in the reward has the gradient of KL(policy || reference); in the loss only k2, k1+ and k3+ have."""
    kl_target: float | None = None
    """Adaptive controller (arXiv:1909.08593, section 2.2): nats per response to steer to; None: fixed kl_coef."""
    kl_horizon: int = 10000
    """Responses over which the adaptive controller corrects."""
    target_kl: float | None = None
    """Leave the policy alone for the rest of the update once a minibatch is farther than this from the old policy (mean
    k3 per token, before its step); the critic goes on. What the last step does is seen in the next iteration."""
    roll_back: bool = False
    """When target_kl stops the update, also undo the step that went too far; keeps a copy of weights and Adam state."""
    aggregation: Aggregation = "token-mean"
    """Weight of a token in its minibatch, in order: 1/tokens, 1/(responses * its response's tokens), 1/responses,
    1/(responses * loss_divisor)."""
    loss_divisor: int | None = None
    """Tokens per sequence that `constant` aggregation divides by (Dr.GRPO, arXiv:2503.20783); None: max_new_tokens."""
    importance_cap: float | None = None
    """Truncated importance weight min(trainer / sampler, cap) on every token; None: off. Needs recomputed log-probs."""
    max_skipped_steps: int = 8
    """Optimizer steps in a row that may be skipped because loss or gradient was not finite; 0: no limit."""
    on_max_skipped: Literal["stop", "roll_back"] = "stop"
    """What then: end the run, or go on with weights and optimizer of the last checkpoint before the first of them."""
    critic_warmup_steps: int = 0
    """First iterations in which only the critic learns; they count in the policy's learning-rate schedule too."""

    def __post_init__(self) -> None:
        require_positive("ppo", self, "num_epochs", "num_minibatches", "max_tokens_per_microbatch", "kl_horizon")
        require_positive("ppo", self, "old_kl_coef", "old_kl_target", "kl_target", "target_kl", "value_clip")
        require_positive("ppo", self, "clip_scores", "loss_divisor", "importance_cap")
        require_unit("ppo", self, "gamma", "lam")
        require(0 <= self.clip_low < 1, f"ppo.clip_low must be in [0, 1), got {self.clip_low}")
        require(self.clip_high >= 0, f"ppo.clip_high must be >= 0, got {self.clip_high}")
        for name in ("value_coef", "entropy_coef", "kl_coef", "critic_warmup_steps", "max_skipped_steps"):
            require(0 <= getattr(self, name) < math.inf, f"ppo.{name} must be >= 0, got {getattr(self, name)}")
        dual = self.dual_clip is None or 1 < self.dual_clip < math.inf
        require(dual, f"ppo.dual_clip must be > 1 and finite, got {self.dual_clip}")
        finite = math.isfinite(self.missing_eos_score)
        require(finite, f"ppo.missing_eos_score must be finite, got {self.missing_eos_score}")
        require(
            self.objective == "clip" or self.num_epochs * self.num_minibatches > 1,
            "ppo.objective = 'kl-penalty' adapts to how far the update moved, which takes at least two steps: raise "
            "ppo.num_epochs or ppo.num_minibatches",
        )
        require(
            self.kl_target is None or self.kl_coef > 0, "ppo.kl_target multiplies ppo.kl_coef, which must be > 0, got 0"
        )
        require(
            self.target_kl is None or self.num_epochs * self.num_minibatches > 1,
            "ppo.target_kl is measured before every step but the first, so it needs at least two: raise ppo.num_epochs "
            "or ppo.num_minibatches",
        )
        require(
            self.critic_warmup_steps == 0 or self.advantage == "gae",
            f"ppo.critic_warmup_steps needs a critic (ppo.advantage = 'gae'), got {self.advantage!r}",
        )
        require(
            self.loss_divisor is None or self.aggregation == "constant",
            f"ppo.loss_divisor only acts with ppo.aggregation = 'constant', got {self.aggregation!r}",
        )
        require(
            self.gamma == 1 or self.advantage in ("gae", "reinforce++"),
            f"ppo.gamma only acts with ppo.advantage 'gae' and 'reinforce++', got {self.advantage!r}",
        )
        require(not self.roll_back or self.target_kl is not None, "ppo.roll_back needs ppo.target_kl, got None")
        require(
            self.kl_in == "loss" or not self.kl_estimator.endswith("+"),
            f"ppo.kl_estimator {self.kl_estimator!r} only differs in its gradient, so it needs ppo.kl_in = 'loss'; "
            f"in the reward use {self.kl_estimator[:-1]!r}",
        )
        require(
            self.truncation != "bootstrap" or self.advantage == "gae",
            f"ppo.truncation = 'bootstrap' needs a critic (ppo.advantage = 'gae'), got {self.advantage!r}",
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
        require(
            self.memory.share == "lora" or self.memory == MemoryConfig(),
            "memory.lora_rank, lora_alpha, lora_targets are of adapters: set memory.share = 'lora', or leave them out",
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
