"""PPOEngine: generate, score, update. Each is usable alone and takes trajectories from anywhere."""

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastppo import advantages, distributed, models, probe, rewards, score, update
from fastppo.advantages import KLController, PenaltyController, RunningMoments
from fastppo.aggregate import sequence_index
from fastppo.batch import Experience, Prompts, Rollout, Sampling, cumulative
from fastppo.checks import RolloutError, require
from fastppo.config import GROUPED, OptimizerConfig, PPOConfig, RolloutConfig
from fastppo.config_offload import OffloadConfig
from fastppo.experience_metrics import experience_metrics
from fastppo.left_out import only_scored
from fastppo.offload.mover import coming
from fastppo.offload.roles import attach, of_frozen
from fastppo.optimizer import Trainable, make_trainable
from fastppo.out_of_memory import Portion
from fastppo.probe import Gap, Limits
from fastppo.protocols import OnFinish, RolloutEngine, SampleScores
from fastppo.rewards import Scores
from fastppo.rollout import make_engine

T = TypeVar("T")


class PPOEngine:
    """One policy and what trains it.

    Args:
        policy: a causal LM from `models.load_policy` or `models.prepare_policy`.
        critic: from `models.critic_from` or `models.load_critic`; None: made from the policy when `ppo` needs one.
        reference: frozen policy for the KL; None: a copy of the policy as it is now, when `ppo` needs one.
        tokenizer: only for its end-of-sequence token and to be saved beside the policy.
        total_steps: PPO iterations that learning-rate schedules span.
        rollout_engine: what samples; None: the embedded engine on the policy itself.
        offload: what waits in host memory between its uses. The critic stays on the device from `score` to `update`.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        *,
        critic: PreTrainedModel | None = None,
        reference: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        ppo: PPOConfig | None = None,
        rollout: RolloutConfig | None = None,
        policy_optimizer: OptimizerConfig | None = None,
        critic_optimizer: OptimizerConfig | None = None,
        offload: OffloadConfig | None = None,
        total_steps: int = 1000,
        seed: int = 1,
        rollout_engine: RolloutEngine | None = None,
    ) -> None:
        self.ppo, self.config, self.tokenizer = ppo or PPOConfig(), rollout or RolloutConfig(), tokenizer
        self.policy, offload = policy, offload or OffloadConfig()
        self.reference = self._reference(reference)
        self._reference_at = of_frozen(self.reference, offload.reference, policy.device, beside=policy)
        self.critic = (critic or models.critic_from(policy)) if self.ppo.advantage == "gae" else None
        self.version = 0  # updates of the policy so far
        self.generator = torch.Generator().manual_seed(seed)  # of minibatch permutations and sampling seeds
        self.moments = RunningMoments()
        self.kl = KLController(self.ppo.kl_coef, self.ppo.kl_target, self.ppo.kl_horizon)
        self.penalty = PenaltyController(self.ppo.old_kl_coef, self.ppo.old_kl_target)
        limit = self.ppo.max_tokens_per_microbatch
        self.budget = Portion(limit, "tokens per micro-batch", "ppo.max_tokens_per_microbatch")
        self._critic = (
            None
            if self.critic is None
            else make_trainable(self.critic, critic_optimizer or OptimizerConfig(), total_steps)
        )
        attach(self._critic, offload, "critic", beside=policy)  # away before the policy's masters are made
        self._policy = make_trainable(policy, policy_optimizer or OptimizerConfig(), total_steps)
        attach(self._policy, offload, "policy")
        self.rollout_engine = rollout_engine or make_engine(
            policy, self.config, eos_token_ids=models.eos_token_ids(policy, tokenizer), seed=seed
        )

    def generate(
        self, prompts: Prompts, sampling: Sampling | None = None, on_finish: OnFinish | None = None
    ) -> Rollout:
        """Sample responses; by default from the distribution PPO trains, `sampling` is for evaluation.

        `on_finish` is told of each response as it ends, in the thread that samples, if the engine knows how to.
        """
        sampling = (sampling or self.sampling).seeded(self.generator)  # so no engine has a generator to lose
        takes = "on_finish" in inspect.signature(self.rollout_engine.generate).parameters
        told: dict[str, Any] = {"on_finish": on_finish} if takes and on_finish is not None else {}
        rollout = self.rollout_engine.generate(prompts, sampling, **told)
        asked = len(prompts) * sampling.samples_per_prompt
        if len(rollout) != asked:
            raise RolloutError(f"the rollout engine answered {len(rollout)} of {asked} requests: none may be dropped")
        return rollout

    def probe(self, prompts: Prompts) -> Gap:
        """Sample a few short responses now and compare their log-probs with the policy's.

        For who samples and trains at the same time: `score` does it by itself for a rollout of the current policy.

        Raises:
            RolloutError: a gap is over its limit (`rollout.gap_stop`).
        """
        few, once = probe.few(prompts, self.sampling, seed=self.version)
        rollout = self.generate(few, once)
        require(rollout.logprobs is not None, "this rollout engine returns no log-probs to compare")
        gap = probe.of_rollout(self._logprobs(self.policy, rollout), rollout, self.version, self._gap_limits)
        assert gap is not None
        return gap

    @property
    def sampling(self) -> Sampling:
        """How training rollouts are drawn."""
        return Sampling(
            temperature=self.config.temperature,
            max_new_tokens=self.config.max_new_tokens,
            stop_token_ids=self.config.stop_token_ids,
            stop_sequences=self.config.stop_sequences,
            samples_per_prompt=self.config.samples_per_prompt,
        )

    def score(self, rollout: Rollout, scores: Scores | Tensor | SampleScores) -> Experience:
        """Turn a rollout and its scores into advantages.

        Args:
            rollout: from `generate`, or `Rollout.pack` for trajectories from elsewhere.
            scores: one number per sequence, or a list per sequence with one per response token.

        Raises:
            ValueError: the rollout was drawn from another distribution than the one that is trained, or has token ids
                that the policy does not know.
            RewardError: scores are not finite numbers, one per sequence or response token, or samples without one
                (`Scores.missing`) leave fewer than ppo.num_minibatches.
            RolloutError: the sampler's log-probs are too far from the policy's (`rollout.gap_stop`).
        """
        rollout = rollout.to(self.policy.device)
        score.check_fits(rollout, self.policy)
        score.check_on_distribution(rollout, self.config)
        scores = scores if isinstance(scores, Scores) else _as_scores(scores, rollout)
        rollout, scores = only_scored(
            rollout, scores, at_least=self.ppo.num_minibatches, grouped=self.ppo.advantage in GROUPED
        )
        cu_seqlens = cumulative(rollout.action_counts)
        with coming(self._reference_at):  # behind the policy's forward
            logprobs = self._old_logprobs(rollout)
            gap = probe.of_rollout(logprobs, rollout, self.version, self._gap_limits)
            cap = self.ppo.importance_cap or probe.cap_for(gap, rollout, self.version, self._gap_limits)
            if self._critic is not None:
                self._critic.weights_at.begin()  # behind the reference's
            self._reference_at.arrive()
            ref_logprobs = None if self.reference is None else self._logprobs(self.reference, rollout)
        if self._critic is not None:
            self._critic.weights_at.arrive()  # and stays: the update begins with it
        values, last_values = (None, None) if self.critic is None else self._values(self.critic, rollout)
        shaped, token_scores = advantages.shape_scores(
            scores.sequences, scores.tokens, rollout.truncated, cu_seqlens, self.ppo, self.moments
        )
        mask = self._loss_mask(rollout, cu_seqlens)
        token_rewards = advantages.shape_rewards(
            shaped, token_scores, logprobs, ref_logprobs, cu_seqlens, self.kl.coef, mask, self.ppo
        )
        advantage, returns = advantages.estimate(
            token_rewards, values, last_values, cu_seqlens, rollout.group_ids, rollout.truncated, mask, self.ppo
        )
        experience = Experience(
            rollout=rollout,
            action_cu_seqlens=cu_seqlens,
            logprobs=logprobs,
            ref_logprobs=ref_logprobs,
            values=values,
            rewards=token_rewards,
            advantages=advantage,
            returns=returns,
            mask=mask,
            is_weights=None if cap is None else probe.importance_weights(logprobs, rollout, cap),
            policy_version=self.version,
            logprobs_are_policys=logprobs is None or logprobs is not rollout.logprobs or rollout.exact,
        )
        experience.metrics.update(experience_metrics(experience, scores, shaped))
        experience.metrics.update({} if gap is None else gap.metrics())
        return experience

    def update(self, experience: Experience) -> dict[str, float]:
        """One PPO iteration's optimizer steps. Returns the metrics of the update and of the experience."""
        train_policy = self.iteration >= self.ppo.critic_warmup_steps
        on_policy = experience.policy_version == self.version and experience.logprobs_are_policys
        single_step = self.ppo.num_epochs * self.ppo.num_minibatches == 1
        require(
            experience.logprobs is not None or (on_policy and single_step),
            "this experience has no log-probs, which only the single step right after `score` can do without: "
            "score again",
        )
        objective = update.Objective(
            temperature=self.config.temperature,
            kl_coef=self.kl.coef,
            old_kl_coef=self.penalty.coef if self.ppo.objective == "kl-penalty" else 0.0,
            loss_divisor=float(self.ppo.loss_divisor or self.config.max_new_tokens),
            train_policy=train_policy,
            on_policy=on_policy,
            check_gap=probe.check_of_update(
                experience, self.version, self._gap_limits, lambda: self._logprobs(self.policy, experience.rollout)
            ),
        )
        for _, role in self._roles():
            role.fault = ""
        metrics = dict(experience.metrics)
        metrics |= update.update(
            self._policy, self._critic, experience, self.ppo, objective, self.generator, self.budget
        )
        self._after_update(metrics, int(distributed.sum_over_ranks(torch.tensor(len(experience)))))
        return metrics

    @property
    def iteration(self) -> int:
        """PPO iterations so far, those that only trained the critic included."""
        return self._policy.iteration

    def save(self, path: str | Path, weights: Mapping[str, Mapping[str, Tensor]] | None = None) -> None:
        """Write `policy/` and `critic/`, each loadable by the AutoModel classes, with the tokenizer.

        `weights`: a copy of what `weights()` returns, to be written instead of the weights as they are now.
        """
        for name, role in self._roles():
            models.save(role.model, Path(path) / name, self.tokenizer, None if weights is None else weights[name])

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """The parameters of each role that learn, not copied."""
        return {
            name: {n: p for n, p in role.model.named_parameters() if p.requires_grad} for name, role in self._roles()
        }

    def state(self) -> dict[str, Any]:
        """What changes as the engine trains, beside weights and generator; JSON."""
        roles = {name: [role.iteration, role.skipped, role.skipped_in_a_row] for name, role in self._roles()}
        coefs = {"kl_coef": self.kl.coef, "old_kl_coef": self.penalty.coef}
        return {"version": self.version, "roles": roles, "moments": dataclasses.asdict(self.moments), **coefs}

    def tensors(self) -> dict[str, Tensor]:
        """float32 weights and optimizer moments as `<role>/<parameter>[/<moment>]`, not copied."""
        return {f"{name}/{key}": x for name, role in self._roles() for key, x in role.state().items()}

    def load(self, state: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Go on where `state` and `tensors` were taken.

        Args:
            tensors: those of a role one after the other, and so those of a parameter.

        Raises:
            ValueError: they are of another model.
        """
        self._load_tensors(tensors)
        for name, role in self._roles():
            require(name in state["roles"], f"the checkpoint has no {name}, this run has one")
            role.iteration, role.skipped, role.skipped_in_a_row = state["roles"][name]
            role.set_rate()
        self.version, self.moments = state["version"], RunningMoments(**state["moments"])
        self.kl.coef, self.penalty.coef = state["kl_coef"], state["old_kl_coef"]
        self.rollout_engine.sync_weights(self.policy, self.version)

    def roll_back(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take over weights and optimizer moments alone, as `load` takes them; counters and controllers go on."""
        self._load_tensors(tensors)
        self.rollout_engine.sync_weights(self.policy, self.version)

    def _load_tensors(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        roles = dict(self._roles())
        for name, group in itertools.groupby(tensors, lambda item: item[0].partition("/")[0]):
            require(name in roles, f"the checkpoint has a {name}, this run has none")
            with roles[name].here():
                roles[name].load((key.partition("/")[2], x) for key, x in group)
        for role in roles.values():
            role.skipped_in_a_row = 0

    def skipped(self) -> dict[str, tuple[int, str]]:
        """Of each role that skipped a step in the last update: how many in a row by now, and why the last one."""
        return {name: (role.skipped_in_a_row, role.fault) for name, role in self._roles() if role.fault}

    @property
    def portions(self) -> dict[str, Portion]:
        """What is halved where memory runs out, on this rank."""
        rows: Portion | None = getattr(self.rollout_engine, "rows", None)
        return {"max_tokens_per_microbatch": self.budget} | ({} if rows is None else {"max_rows": rows})

    def _roles(self) -> list[tuple[str, Trainable]]:
        """The models that learn, in alphabetical order, as checkpoints have them."""
        return (
            [("policy", self._policy)] if self._critic is None else [("critic", self._critic), ("policy", self._policy)]
        )

    def _reference(self, reference: PreTrainedModel | None) -> PreTrainedModel | None:
        if self.ppo.kl_coef == 0:
            return None
        return models.frozen(reference) if reference is not None else models.reference_of(self.policy)

    def _old_logprobs(self, rollout: Rollout) -> Tensor | None:
        """Log-probs of the policy before the update; None where nothing will ask for them."""
        cap = self.ppo.importance_cap
        require(
            cap is None or rollout.logprobs is not None,
            "ppo.importance_cap needs the sampler's log-probs, but the rollout has none",
        )
        if cap is None and score.sampler_is_enough(rollout, self.config, self.version):
            return rollout.logprobs
        single_step = self.ppo.num_epochs * self.ppo.num_minibatches == 1
        in_reward = self.reference is not None and self.ppo.kl_in == "reward"
        compared = rollout.logprobs is not None and rollout.policy_version == self.version  # a gap can be corrected
        if single_step and not (in_reward or compared) and cap is None and self.config.old_logprobs == "auto":
            return None  # no forward
        return self._logprobs(self.policy, rollout)

    @property
    def _gap_limits(self) -> Limits:
        return probe.limits(self.config, self.policy.dtype)

    def _logprobs(self, model: PreTrainedModel, rollout: Rollout) -> Tensor:
        temperature = self.config.temperature
        return self._scored(
            rollout, lambda n: score.action_logprobs(model, rollout, temperature=temperature, max_tokens=n)
        )

    def _values(self, critic: PreTrainedModel, rollout: Rollout) -> tuple[Tensor, Tensor]:
        return self._scored(rollout, lambda n: score.state_values(critic, rollout, max_tokens=n))

    def _scored(self, rollout: Rollout, attempt: Callable[[int], T]) -> T:
        longest, whole = int(rollout.cu_seqlens.diff().max()), len(rollout.input_ids)
        return self.budget.run("scoring", attempt, smallest=longest, whole=whole)

    def _loss_mask(self, rollout: Rollout, cu_seqlens: Tensor) -> Tensor:
        keep = ~rollout.truncated if self.ppo.truncation == "mask" else torch.ones_like(rollout.truncated)
        return keep[sequence_index(cu_seqlens)]

    def _after_update(self, metrics: dict[str, float], num_sequences: int) -> None:
        metrics["objective/kl_coef"] = self.kl.coef
        if "objective/kl" in metrics:
            self.kl.update(metrics["objective/kl"], num_sequences)
        if self.ppo.objective == "kl-penalty" and "policy/kl_last" in metrics:
            metrics["policy/old_kl_coef"] = self.penalty.coef
            self.penalty.update(metrics["policy/kl_last"])
        for name, role in self._roles():
            metrics[f"{name}/lr"] = role.rate
            metrics[f"{name}/skipped_steps"] = float(role.skipped)
            role.next_iteration()
        metrics |= {f"memory/{name}": float(x.size) for name, x in self.portions.items() if x.failures}
        self.version += 1
        self.rollout_engine.sync_weights(self.policy, self.version)


def _as_scores(scores: Tensor | SampleScores, rollout: Rollout) -> Scores:
    per_sequence, per_token = rewards.check_scores(scores, rollout, "scores")
    device = rollout.input_ids.device
    if per_token is None:
        return Scores(per_sequence.to(device), None, {})
    return Scores(torch.zeros_like(per_sequence, device=device), per_token.to(device), {})
