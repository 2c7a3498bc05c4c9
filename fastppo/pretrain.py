"""What has to exist before PPO: a supervised policy and a reward model, trained on token ids.

For the demo and the examples. Both use the trainer's own packed forward, so they train in minutes on a CPU.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from fastppo import models
from fastppo.batch import Rollout
from fastppo.checks import require
from fastppo.microbatch import gather
from fastppo.report import progress
from fastppo_kernels import token_logprobs


def train_supervised(
    model: PreTrainedModel,
    examples: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
) -> float:
    """Maximise the log-prob of the responses; returns the mean loss of the last tenth, nats per token.

    Args:
        model: from `models.prepare_policy`.
        examples: (prompt ids, response ids); only response tokens are trained on.
    """

    def loss(index: Sequence[int]) -> Tensor:
        rollout = Rollout.pack([examples[i][0] for i in index], [examples[i][1] for i in index], device=model.device)
        batch = gather(rollout, range(len(rollout)))
        head = models.lm_head(model)
        hidden = models.hidden_states(model, batch)[batch.rows]
        return -token_logprobs(hidden, head.weight, batch.targets, bias=head.bias, softcap=head.softcap).mean()

    return _fit(model, loss, len(examples), steps=steps, batch_size=batch_size, lr=lr, seed=seed, title="sft")


def train_reward_model(
    model: PreTrainedModel,
    comparisons: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
) -> float:
    """Bradley-Terry: maximise log sigmoid(score(chosen) - score(rejected)); returns the mean loss of the last tenth.

    Several rejected sequences beside one chosen cost one forward pass more each, where pairs cost two
    (Ouyang et al. 2022, section 3.5).

    Args:
        model: from `models.reward_model_from`.
        comparisons: (chosen, rejected ones), each a whole sequence of token ids, prompt included.
    """

    def loss(index: Sequence[int]) -> Tensor:
        chosen, rejected = zip(*(comparisons[i] for i in index), strict=True)
        ids = [*chosen, *(ids for several in rejected for ids in several)]
        batch = gather(Rollout.pack(ids, [[] for _ in ids], device=model.device), range(len(ids)))
        last = batch.packing.cu_seqlens[1:].long() - 1
        scores = models.classify(model, models.hidden_states(model, batch)[last])[:, 0]
        repeats = torch.tensor([len(several) for several in rejected], device=scores.device)
        better, worse = scores.tensor_split([len(chosen)])
        return -F.logsigmoid(better.repeat_interleave(repeats) - worse).mean()

    return _fit(
        model, loss, len(comparisons), steps=steps, batch_size=batch_size, lr=lr, seed=seed, title="reward model"
    )


def _fit(
    model: PreTrainedModel,
    loss_of: Callable[[Sequence[int]], Tensor],
    num_examples: int,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    title: str,
) -> float:
    """AdamW on random batches, its rate up over three tenths of the steps and down again.

    A shorter warm-up and a longer memory than beta2 = 0.98 cost a reward model the features its body came with.
    """
    require(num_examples >= batch_size, f"{title}: {num_examples} examples are fewer than a batch of {batch_size}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.3)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    with progress(steps, title=title) as show:
        for _ in range(steps):
            index = torch.randint(num_examples, (batch_size,), generator=generator).tolist()
            loss = loss_of(index)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(float(loss.detach()))
            show({"loss": losses[-1]})
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)
