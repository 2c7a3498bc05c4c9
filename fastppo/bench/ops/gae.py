"""Generalized advantage estimation: the kernel, the scan of the reference, and a loop over time steps.

    fastppo bench kernels --ops gae [--shapes 512,1024] [--holes 0.1] [--out FILE]

The loop is what RLHF frameworks run: padded (B, T) tensors, one time step after the other, tokens that are no action
blended away with the mask, the way verl's compute_gae_advantage_return does it. Least bytes: rewards, values and mask
read, advantages and returns written, 17 per token.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastppo.bench import arguments, harness
from fastppo.bench.harness import Case, Outputs, Variant
from fastppo_kernels import gae

GAMMA, LAM = 1.0, 0.95
SHAPES = [(512, 1024), (512, 4096)], [(512, 2048), (2048, 2048)]  # sequences, tokens of each: CPU, GPU


class Problem(NamedTuple):
    rewards: Tensor  # (B, T)
    values: Tensor  # (B, T)
    mask: Tensor  # (B, T) bool
    cu_seqlens: Tensor  # (B + 1,)


def make_problem(B: int, T: int, holes: float, device: str) -> Problem:
    rewards, values = torch.randn(B, T, device=device), torch.randn(B, T, device=device)
    mask = torch.rand(B, T, device=device) >= holes
    return Problem(rewards, values, mask, torch.arange(0, B * T + 1, T, dtype=torch.int32, device=device))


def fastppo(p: Problem, backend: str | None = None) -> Outputs:
    flat = (p.rewards.flatten(), p.values.flatten(), p.cu_seqlens)
    advantages, returns = gae(*flat, gamma=GAMMA, lam=LAM, mask=p.mask.flatten(), backend=backend)
    return {"advantages": advantages, "returns": returns}


def loop(rewards: Tensor, values: Tensor, mask: Tensor) -> Outputs:
    """One step back in time per pass, about a dozen kernels on (B,) vectors each."""
    next_value, advantage, steps = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0]), []
    for t in reversed(range(rewards.shape[1])):
        action = mask[:, t]
        delta = rewards[:, t] + GAMMA * next_value - values[:, t]
        here = delta + GAMMA * LAM * advantage
        next_value = action * values[:, t] + (1 - action) * next_value
        advantage = action * here + (1 - action) * advantage
        steps.append(advantage)
    advantages = torch.stack(steps[::-1], dim=1)
    return {"advantages": (advantages * mask).flatten(), "returns": ((advantages + values) * mask).flatten()}


def verl(p: Problem, floats: Tensor, module: Any) -> Outputs:
    """verl's own, which whitens the advantages too: its returns are what is compared."""
    _, returns = module.compute_gae_advantage_return(p.rewards, p.values, floats, GAMMA, LAM)
    return {"returns": (returns * floats).flatten()}


def variants(p: Problem, truth: Outputs) -> dict[str, Variant | str]:
    floats, returns = p.mask.float(), {"returns": truth["returns"]}
    return {
        harness.OURS: Variant(run=lambda: fastppo(p)),
        "fastppo reference": Variant(run=lambda: fastppo(p, "reference")),
        "loop, as verl writes it": Variant(run=lambda: loop(p.rewards, p.values, floats)),
        "verl 0.9.1": harness.peer(
            "verl.trainer.ppo.core_algos",
            lambda m: Variant(run=lambda: verl(p, floats, m), truth=returns, note="whitens too"),
        ),
    }


def cases(options: Any) -> Iterator[Case]:
    for B, T in [(8, 64)] if options.quick else options.shapes or SHAPES[options.device != "cpu"]:
        p = make_problem(B, T, options.holes, options.device)
        truth = loop(p.rewards.double(), p.values.double(), p.mask.double())
        yield Case(
            op="gae",
            setting={"B": B, "T": T, "holes": options.holes},
            variants=variants(p, truth),
            truth=truth,
            tolerance=1e-5,
            num_bytes=17 * B * T,
            tokens=B * T,
        )


def parser() -> argparse.ArgumentParser:
    made = arguments.parser(__doc__, repeats=9)
    made.add_argument("--shapes", type=arguments.sizes("B,T"), nargs="+", metavar="B,T")
    made.add_argument("--holes", type=float, default=0.1, help="part of the tokens that are no action")
    return made
