"""PPO learns a rewarded token, the tabular optimum and a critic's target; step by step it is the textbook's."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

import tiny
from batches import (
    LENGTHS,
    SCORES,
    bfloat16,
    engine,
    largest_gap,
    prompts,
    trajectories,
    weights,
)
from fastppo import OptimizerConfig, Prompts, Rollout, models
from fastppo.attention import dense_attention
from fastppo.score import action_logprobs

PLAIN: dict[str, Any] = {"kl_coef": 0.0, "truncation": "none"}


def small_policy(vocab: int) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=vocab, bos_token_id=None, eos_token_id=None, **shape)  # pyright: ignore
    return models.prepare_policy(models.new_causal_lm(config))


def distribution(policy: PreTrainedModel, prompt: Sequence[int], vocab: int) -> Tensor:
    alphabet = Rollout.pack([prompt] * vocab, [[t] for t in range(vocab)])
    return action_logprobs(policy, alphabet, temperature=1.0, max_tokens=10_000).double()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("advantage", ["gae", "rloo"])
def test_a_rewarded_token_becomes_certain(advantage: str, dtype: str) -> None:
    """CORRECTNESS F4: its probability rises from step to step until it is all there is."""
    policy, token = tiny.policy(scale=1.0), 11
    made = engine(
        policy if dtype == "float32" else bfloat16(policy),
        ppo={**PLAIN, "advantage": advantage, "num_epochs": 2},
        rollout={"max_new_tokens": 4, "samples_per_prompt": 4},
        optimizer={"lr": 3e-3},
    )
    given, rewards, certain = prompts(32), [], []
    for _ in range(40):
        rollout = made.generate(given)
        scores = [sum(t == token for t in response) / 4 for _, response in rollout.sequences()]
        made.update(made.score(rollout, scores))
        rewards.append(sum(scores) / len(scores))
        certain.append(float(distribution(made.policy, [1, 2, 3], tiny.VOCAB)[token].exp()))
    assert rewards[0] < 0.1 and rewards[-1] >= 0.95, rewards
    assert all(later > earlier for earlier, later in zip(certain[:6], certain[1:7], strict=True)), certain


@pytest.mark.parametrize("advantage", ["gae", "dr_grpo"])
def test_the_tabular_optimum_is_reached(advantage: str) -> None:
    """CORRECTNESS F1, A8: pi* is proportional to ref * exp(r / beta), with k1 in the reward."""
    vocab, beta, prompt, samples = 8, 0.5, (1, 2), 512
    reward = torch.tensor([0.0, 1.0, -0.5, 0.3, 0.8, -1.0, 0.2, 0.6], dtype=torch.float64)
    made = engine(
        small_policy(vocab),
        ppo={
            "advantage": advantage,
            "kl_coef": beta,
            "truncation": "none",
            "num_epochs": 2,
            "whiten_advantages": False,
        },
        rollout={"max_new_tokens": 1, "samples_per_prompt": samples},
        optimizer={"lr": 1e-2, "schedule": "linear"},
        total_steps=60,
    )
    target = (distribution(made.policy, prompt, vocab) + reward / beta).log_softmax(0)
    start = distribution(made.policy, prompt, vocab)
    for _ in range(60):
        rollout = made.generate(Prompts(token_ids=(prompt,)))
        made.update(made.score(rollout, reward[rollout.input_ids[rollout.action_index]].float()))
    end = distribution(made.policy, prompt, vocab)
    distance = [float((p.exp() * (p - target)).sum()) for p in (start, end)]
    assert distance[0] > 0.3 and distance[1] < 1e-2, distance


def test_the_critic_learns_a_constant_reward() -> None:
    """CORRECTNESS F5: V -> R in every state."""
    made = engine(ppo={**PLAIN, "lam": 1.0, "num_epochs": 4, "value_coef": 1.0, "value_clip": None})
    for _ in range(60):
        made.update(made.score(trajectories(), [0.7] * 8))
    values = made.score(trajectories(), [0.7] * 8).values
    assert values is not None and float((values - 0.7).abs().max()) < 0.03


def test_the_critic_explains_what_the_prompt_decides() -> None:
    """CORRECTNESS F5: explained variance from 0 to 1."""
    made = engine(
        ppo={**PLAIN, "lam": 1.0, "num_epochs": 4, "value_clip": None},
        optimizer={"lr": 0.0},
        critic_optimizer=OptimizerConfig(lr=3e-3, schedule="constant"),
    )
    explained = [made.update(made.score(trajectories(), SCORES))["val/explained_variance"] for _ in range(60)]
    assert abs(explained[0]) < 0.01 and explained[-1] > 0.98, explained[::10]


# -- the textbook ------------------------------------------------------------------------------------------------------

BETA, GAMMA, LAM, TEMPERATURE, EPOCHS, LR = 0.1, 0.9, 0.8, 0.7, 2, 3e-4


class Textbook:
    """PPO on right-padded batches in plain PyTorch, one sequence per row, everything of shape (B, T)."""

    def __init__(self, policy: PreTrainedModel, critic: PreTrainedModel) -> None:
        self.policy, self.critic, self.reference = (copy.deepcopy(m) for m in (policy, critic, policy))
        self.optimizers = [torch.optim.Adam(m.parameters(), lr=LR, eps=1e-5) for m in (self.policy, self.critic)]

    def forward(self, model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        with dense_attention(model):
            return model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    def logprobs(self, model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        logits = self.forward(model, ids, mask)[:, :-1] / TEMPERATURE
        return F.log_softmax(logits, dim=-1).gather(2, ids[:, 1:, None]).squeeze(2)

    def values(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.forward(self.critic, ids, mask)[:, :-1, 0]

    def step(self, rollout: Rollout, scores: Sequence[float]) -> list[float]:
        """One iteration; returns the mean gradient norms of policy and critic."""
        rows = rollout.sequences()
        width = max(len(p) + len(r) for p, r in rows)
        ids = torch.tensor([[*p, *r, *[0] * (width - len(p) - len(r))] for p, r in rows])
        mask = torch.tensor([[1] * (len(p) + len(r)) + [0] * (width - len(p) - len(r)) for p, r in rows])
        action = torch.tensor([[len(p) <= t + 1 < len(p) + len(r) for t in range(width - 1)] for p, r in rows])
        with torch.no_grad():
            old, ref = self.logprobs(self.policy, ids, mask), self.logprobs(self.reference, ids, mask)
            old_values = self.values(ids, mask) * action
        rewards = -BETA * (old - ref) * action
        for row, ((p, r), score) in enumerate(zip(rows, scores, strict=True)):
            rewards[row, len(p) + len(r) - 2] += score
        advantages, running = torch.zeros_like(rewards), torch.zeros(len(rows))
        for t in reversed(range(width - 1)):
            after = old_values[:, t + 1] if t + 1 < width - 1 else torch.zeros(len(rows))
            running = (rewards[:, t] + GAMMA * after - old_values[:, t] + GAMMA * LAM * running) * action[:, t]
            advantages[:, t] = running
        returns = advantages + old_values
        live = advantages[action]
        advantages = (advantages - live.mean()) / (live.var(correction=0) + 1e-8).sqrt()
        norms = [0.0, 0.0]
        for _ in range(EPOCHS):
            ratio = (self.logprobs(self.policy, ids, mask) - old).exp()
            policy_loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))[action].mean()
            values = self.values(ids, mask)
            near = old_values + (values - old_values).clamp(-0.2, 0.2)
            value_loss = 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)[action].mean()
            roles = zip((self.policy, self.critic), self.optimizers, (policy_loss, 0.1 * value_loss), strict=True)
            for i, (model, optimizer, loss) in enumerate(roles):
                optimizer.zero_grad()
                loss.backward()
                norms[i] += float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)) / EPOCHS
                optimizer.step()
        return norms


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_ten_updates_equal_the_textbook(architecture: str) -> None:
    """CORRECTNESS F7."""
    policy = tiny.policy(architecture)
    made = engine(
        policy,
        ppo={"kl_coef": BETA, "gamma": GAMMA, "lam": LAM, "num_epochs": EPOCHS, "max_tokens_per_microbatch": 30},
        rollout={"temperature": TEMPERATURE},
        optimizer={"lr": LR},
    )
    book, before = Textbook(made.policy, made.critic), weights(policy)  # pyright: ignore[reportArgumentType]
    for seed in range(10):
        rollout = trajectories(LENGTHS, seed=seed)
        logged = made.update(made.score(rollout, SCORES))
        norms = [logged["policy/grad_norm"], logged["critic/grad_norm"]]
        assert norms == pytest.approx(book.step(rollout, SCORES), rel=1e-4)
    assert largest_gap(weights(made.policy), before) > 1e-3
    assert largest_gap(weights(made.policy), weights(book.policy)) <= 1e-5
    assert largest_gap(weights(made.critic), weights(book.critic)) <= 1e-5
