"""One optimizer step of policy and critic, beside a reference and a reward model, made in ever less memory.

The baseline is what a PPO trainer without kernels does: sequences padded to the longest, logits of every position,
log-softmax by PyTorch, everything kept for the backward. All steps train on the same trajectories, the eager ones in
micro-batches of eight sequences, fastppo's in micro-batches of as many tokens as the largest of those has.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from memory_cases import Case, build, config
from memory_profile import MemoryProfile
from torch import Tensor

from fastppo import Experience, PPOEngine, Rollout, models
from fastppo.attention import dense_attention
from fastppo.microbatch import MicroBatch, gather
from fastppo_kernels import ppo_loss, value_loss

SEQUENCES, AT_A_TIME, PROMPT, LONGEST, VOCABULARY = 32, 8, 64, 128, 32000
Backward = Callable[[PPOEngine, Experience, list[int]], None]


def steps() -> Iterator[tuple[str, int, int]]:
    """Name, peak bytes of the step, and bytes that were there before it."""
    lengths = _trajectories().cu_seqlens.diff()
    largest = int(lengths.view(-1, AT_A_TIME).sum(1).max())
    plain = Case("ablation", VOCABULARY, max_tokens=largest, num_minibatches=1, hidden_size=256, num_layers=6)
    recomputed = replace(plain, checkpointing="full")
    shared = replace(recomputed, share="lora", reward_adapter=True)
    yield "eager, padded, four copies", *_measure(plain, _eager_padded)
    yield "+ packing", *_measure(plain, _eager_packed)
    yield "+ fused head", *_measure(plain)
    yield "+ checkpointing", *_measure(recomputed)
    yield "+ sharing", *_measure(shared)
    yield "+ 8-bit moments", *_measure(replace(shared, optimizer="adamw-8bit"))
    yield "no sharing, 8-bit moments", *_measure(replace(recomputed, optimizer="adamw-8bit"))
    yield "no sharing, selective checkpointing", *_measure(replace(plain, checkpointing="selective"))
    yield "no sharing, every second layer", *_measure(replace(recomputed, every=2))


def _measure(case: Case, backward: Backward | None = None) -> tuple[int, int]:
    """`backward` of None: the engine's own update."""
    with tempfile.TemporaryDirectory() as folder:
        run = config(case, Path(folder))
    torch.manual_seed(0)
    with MemoryProfile() as profile:
        engine, rewards = build(run, case)
        experience = engine.score(_trajectories(), [float(i % 3) for i in range(SEQUENCES)])
        for name in ("first step", "step"):
            with profile.phase(name):
                _step(engine, experience, backward)
        del rewards
    use = profile.phases["step"]
    return use.peak, use.before


def _step(engine: PPOEngine, experience: Experience, backward: Backward | None) -> None:
    if backward is None:
        engine.update(experience)
        return
    for start in range(0, SEQUENCES, AT_A_TIME):
        backward(engine, experience, list(range(start, start + AT_A_TIME)))
    engine._policy.step()
    assert engine._critic is not None
    engine._critic.step()


def _trajectories() -> Rollout:
    """Responses of 16 to 128 tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(16, LONGEST, SEQUENCES).long()[torch.randperm(SEQUENCES, generator=generator)].tolist()
    draw = lambda n: torch.randint(0, VOCABULARY, (n,), generator=generator).tolist()  # noqa: E731
    return Rollout.pack([draw(PROMPT) for _ in lengths], [draw(n) for n in lengths])


def _eager_padded(engine: PPOEngine, experience: Experience, sequences: list[int]) -> None:
    """Ordinary forwards of both models, one after the other, on right-padded rows."""
    batch = gather(experience.rollout, sequences)
    ids, mask, places = _padded(batch)
    for model, backward in ((engine.policy, _policy_backward), (engine.critic, _critic_backward)):
        assert model is not None
        with dense_attention(model):
            out = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        backward(out.flatten(0, 1)[places], batch, experience)


def _eager_packed(engine: PPOEngine, experience: Experience, sequences: list[int]) -> None:
    """Packed forwards, logits of the response's tokens alone."""
    batch = gather(experience.rollout, sequences)
    head = models.lm_head(engine.policy)
    hidden = models.hidden_states(engine.policy, batch)[batch.rows]
    _policy_backward(torch.nn.functional.linear(hidden, head.weight, head.bias), batch, experience)
    assert engine.critic is not None
    _critic_backward(models.values(engine.critic, batch)[batch.rows][:, None], batch, experience)


def _policy_backward(logits: Tensor, batch: MicroBatch, experience: Experience) -> None:
    logprobs = logits.log_softmax(-1).gather(1, batch.targets[:, None]).squeeze(1)
    weights = torch.full_like(logprobs, 1 / len(experience.advantages)).detach()
    assert experience.logprobs is not None
    old, advantages = experience.logprobs[batch.actions], experience.advantages[batch.actions]
    loss, _ = ppo_loss(logprobs, old, advantages, weights)
    loss.backward()


def _critic_backward(values: Tensor, batch: MicroBatch, experience: Experience) -> None:
    assert experience.values is not None and experience.returns is not None
    weights = torch.full_like(values[:, 0], 1 / len(experience.advantages)).detach()
    old, returns = experience.values[batch.actions], experience.returns[batch.actions]
    loss, _ = value_loss(values[:, 0], old, returns, weights)
    loss.backward()


def _padded(batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and mask (b, T), and where in them the states of the actions are."""
    starts, lengths = batch.packing.cu_seqlens[:-1].long(), batch.packing.cu_seqlens.diff().long()
    width = int(lengths.max())
    mask = torch.arange(width) < lengths[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    ids[mask] = batch.input_ids
    row = torch.searchsorted(starts, batch.rows, right=True) - 1
    return ids, mask.long(), row * width + batch.rows - starts[row]
