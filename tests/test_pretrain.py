"""The reward model's training."""

import pytest
import torch

from fastppo import models, pretrain
from tests import tiny

CHOSEN, REJECTED = [1, 2, 3], [[1, 2, 4], [1, 5], [1, 2, 3, 6]]


def loss(comparisons: list[tuple[list[int], list[list[int]]]]) -> float:
    """Of the first step, before anything has moved."""
    torch.manual_seed(0)  # the new head is random
    reward = models.reward_model_from(tiny.policy())
    return pretrain.train_reward_model(reward, comparisons, steps=1, batch_size=1, lr=1e-3, seed=0)


def test_several_rejected_beside_one_chosen_are_as_many_pairs():
    pairs = [loss([(CHOSEN, [ids])]) for ids in REJECTED]
    assert loss([(CHOSEN, REJECTED)]) == pytest.approx(sum(pairs) / len(pairs), rel=1e-6)
    assert len(set(pairs)) == len(pairs)


def test_the_chosen_ends_above_every_rejected():
    reward = models.reward_model_from(tiny.policy())
    first = loss([(CHOSEN, REJECTED)])
    last = pretrain.train_reward_model(reward, [(CHOSEN, REJECTED)], steps=20, batch_size=1, lr=1e-2, seed=0)
    assert last < 0.1 < first
