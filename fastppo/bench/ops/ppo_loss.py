"""The PPO loss and its gradient from log-probs, a float32 number per action: fastppo's op, PyTorch, verl, OpenRLHF.

    fastppo bench kernels --ops ppo_loss [--shapes 512,1024] [--out FILE]

B sequences of T actions, all of them weighted 1 / (B T). Least bytes: log-probs, old log-probs, advantages and weights
read, the gradient written, 20 per action. verl's loss has a dual clip, which is set out of reach here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastppo.bench import arguments, harness
from fastppo.bench.harness import Case, Outputs, Variant
from fastppo.bench.problems import CLIP, gradients, leaf
from fastppo_kernels import ppo_loss

SHAPES = [(64, 1024), (512, 1024)], [(512, 2048), (2048, 2048)]  # CPU, GPU


class Problem(NamedTuple):
    logprobs: Tensor  # (B, T), and below
    old_logprobs: Tensor
    advantages: Tensor

    @property
    def weights(self) -> Tensor:
        return torch.full_like(self.logprobs, 1.0 / self.logprobs.numel())


Loss = Callable[[Tensor, Problem], Tensor]


def make_problem(B: int, T: int, device: str) -> Problem:
    old = -torch.rand(B, T, device=device) * 10
    return Problem(old + 0.2 * torch.randn_like(old), old, torch.randn_like(old))


def plain(logprobs: Tensor, p: Problem) -> Tensor:
    """What a trainer writes."""
    ratio = (logprobs - p.old_logprobs).exp()
    return torch.maximum(-p.advantages * ratio, -p.advantages * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()


def run(p: Problem, loss: Loss) -> Outputs:
    logprobs = leaf(p.logprobs)
    return gradients(loss(logprobs, p), logprobs=logprobs)


def fastppo(weights: Tensor, logprobs: Tensor, p: Problem) -> Tensor:
    rows = (x.flatten() for x in (logprobs, p.old_logprobs, p.advantages, weights))
    return ppo_loss(*rows, clip_low=CLIP, clip_high=CLIP)[0]


def verl(module: Any, mask: Tensor, logprobs: Tensor, p: Problem) -> Tensor:
    config = _Config(clip_ratio=CLIP, clip_ratio_low=CLIP, clip_ratio_high=CLIP, clip_ratio_c=1e9, global_batch_info={})
    return module.compute_policy_loss_vanilla(p.old_logprobs, logprobs, p.advantages, mask, config=config)[0]


class _Config(SimpleNamespace):
    """verl's configs answer to attributes and to `get`."""

    def get(self, name: str, default: Any) -> Any:
        return getattr(self, name, default)


def openrlhf(module: Any, mask: Tensor, logprobs: Tensor, p: Problem) -> Tensor:
    return module.PolicyLoss(CLIP, CLIP)(logprobs, p.old_logprobs, p.advantages, action_mask=mask)[0]


def variants(p: Problem) -> dict[str, Variant | str]:
    def of(loss: Loss) -> Variant:
        return Variant(run=lambda: run(p, loss))

    mask, weights = torch.ones_like(p.logprobs), p.weights
    return {
        harness.OURS: of(partial(fastppo, weights)),
        "torch eager": of(plain),
        "torch.compile": of(torch.compile(plain, dynamic=False)),
        "verl 0.9.1": harness.peer("verl.trainer.ppo.core_algos", lambda m: of(partial(verl, m, mask))),
        "OpenRLHF": harness.peer("openrlhf.models.loss", lambda m: of(partial(openrlhf, m, mask))),
    }


def cases(options: Any) -> Iterator[Case]:
    for B, T in [(8, 64)] if options.quick else options.shapes or SHAPES[options.device != "cpu"]:
        p = make_problem(B, T, options.device)
        yield Case(
            op="ppo_loss",
            setting={"B": B, "T": T},
            variants=variants(p),
            truth=run(Problem(*(x.double() for x in p)), plain),
            tolerance=1e-5,
            num_bytes=20 * B * T,
            tokens=B * T,
        )


def parser() -> argparse.ArgumentParser:
    made = arguments.parser(__doc__, repeats=15)
    made.add_argument("--shapes", type=arguments.sizes("B,T"), nargs="+", metavar="B,T")
    return made
