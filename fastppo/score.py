"""What the models say of a rollout: log-probs under policy and reference, values. No gradients here."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastppo import models
from fastppo.batch import Rollout
from fastppo.checks import require
from fastppo.config import RolloutConfig
from fastppo.microbatch import microbatches
from fastppo_kernels import token_logprobs


@torch.no_grad()
def action_logprobs(model: PreTrainedModel, rollout: Rollout, *, temperature: float, max_tokens: int) -> Tensor:
    """Log-prob of every action under `model`, float32 (R,): log softmax(logits / temperature)[action]."""
    head = models.lm_head(model)
    out = torch.empty(int(rollout.loss_mask.sum()), device=rollout.input_ids.device)
    for batch in microbatches(rollout, max_tokens):
        out[batch.actions] = token_logprobs(
            models.hidden_states(model, batch)[batch.rows],
            head.weight,
            batch.targets,
            bias=head.bias,
            temperature=temperature,
            softcap=head.softcap,
        )
    return out


@torch.no_grad()
def state_values(critic: PreTrainedModel, rollout: Rollout, *, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Values before every action (R,), and of the last state of every sequence (B,), float32.

    The second is what a cut response is bootstrapped with.
    """
    out = torch.empty(rollout.input_ids.shape[0], device=rollout.input_ids.device)
    for batch in microbatches(rollout, max_tokens):
        out[batch.tokens] = models.values(critic, batch)
    return out[rollout.action_index - 1], out[rollout.cu_seqlens[1:].long() - 1]


def check_fits(rollout: Rollout, policy: PreTrainedModel) -> None:
    """Foreign trajectories may hold what the policy cannot read.

    Raises:
        ValueError: a token id beyond the vocabulary, or a sequence longer than the context.
    """
    size, largest = models.lm_head(policy).weight.shape[0], int(rollout.input_ids.max())
    require(largest < size, f"token ids must be in [0, {size}), the policy's vocabulary, got {largest}")
    context, longest = models.context_length(policy), int(rollout.cu_seqlens.diff().max())
    require(longest <= context, f"a sequence has {longest} tokens, more than the policy's context of {context}: cut it")


def check_on_distribution(rollout: Rollout, config: RolloutConfig) -> None:
    """A rollout drawn from another distribution than the one that is scored has no ratio.

    Raises:
        ValueError: top-k or top-p cut the distribution, or the temperatures differ.
    """
    if rollout.sampling is None:
        return
    require(
        not rollout.sampling.truncated,
        f"the rollout was sampled with top_k = {rollout.sampling.top_k}, top_p = {rollout.sampling.top_p}: PPO needs "
        "the whole distribution; use top_k = 0 and top_p = 1",
    )
    require(
        rollout.sampling.temperature == config.temperature,
        f"the rollout was sampled at temperature {rollout.sampling.temperature}, but rollout.temperature = "
        f"{config.temperature} is what log-probs are computed at: use one value",
    )


def sampler_is_enough(rollout: Rollout, config: RolloutConfig, version: int) -> bool:
    """Whether the sampler's log-probs stand for the policy's, so that a forward can be saved."""
    if config.old_logprobs == "recompute":
        return False
    usable = rollout.logprobs is not None and rollout.policy_version == version
    require(
        usable or config.old_logprobs == "auto",
        "rollout.old_logprobs = 'sampler' needs a rollout of the current policy with log-probs; use 'recompute'",
    )
    return usable and (rollout.exact or config.old_logprobs == "sampler")
