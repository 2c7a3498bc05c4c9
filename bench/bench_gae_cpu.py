"""Generalized advantage estimation on the CPU: the C++ sweep, the scan of the reference, and a loop over time steps.

    python bench/bench_gae_cpu.py
    python bench/bench_gae_cpu.py --sequences 512 --tokens 4096 --holes 0.1

The loop is what RLHF frameworks run: padded (B, T) tensors, one time step after the other, tokens that are no action
blended away with the mask. All three are first checked against the loop in float64; then rounds of all three alternate,
so that a slow minute of the machine hits each, and one JSON line per implementation gives the median and the minimum.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fastppo_kernels import gae

GAMMA, LAM = 1.0, 0.95
Pair = tuple[Tensor, Tensor]


def loop(rewards: Tensor, values: Tensor, mask: Tensor) -> Pair:
    """(advantages, returns), (B, T): one step back in time per pass, about a dozen kernels on (B,) vectors each."""
    next_value, advantage, steps = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0]), []
    for t in reversed(range(rewards.shape[1])):
        action = mask[:, t]
        delta = rewards[:, t] + GAMMA * next_value - values[:, t]
        here = delta + GAMMA * LAM * advantage
        next_value = action * values[:, t] + (1 - action) * next_value
        advantage = action * here + (1 - action) * advantage
        steps.append(advantage)
    advantages = torch.stack(steps[::-1], dim=1)
    return advantages * mask, (advantages + values) * mask


def check(name: str, made: Pair, truth: Pair, floats: float = 1e-4) -> None:
    """Raise SystemExit where an implementation errs: a wrong answer has no speed."""
    for what, a, t in zip(("advantages", "returns"), made, truth, strict=True):
        error = (a.double().flatten() - t.flatten()).abs().max().item()
        if not error <= floats * t.abs().max().item():
            raise SystemExit(f"{name}: {what} differ from float64 by {error:.2e}")


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=1024, help="of each sequence")
    parser.add_argument("--holes", type=float, default=0.0, help="part of the tokens that are no action")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    B, T = arguments.sequences, arguments.tokens
    rewards, values, mask = torch.randn(B, T), torch.randn(B, T), torch.rand(B, T) >= arguments.holes
    packed = (rewards.flatten(), values.flatten(), torch.arange(0, B * T + 1, T, dtype=torch.int32))
    flat_mask, float_mask = mask.flatten(), mask.float()
    runs: dict[str, Callable[[], Pair]] = {
        name: lambda backend=name: gae(*packed, gamma=GAMMA, lam=LAM, mask=flat_mask, backend=backend)
        for name in ("native", "reference")
    }
    runs["loop"] = lambda: loop(rewards, values, float_mask)
    truth = loop(rewards.double(), values.double(), mask.double())
    for name, run in runs.items():
        check(name, run(), truth)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            repeats = 1 if name == "loop" else 5
            times[name] += [seconds(run) for _ in range(repeats)]
    median = {name: statistics.median(t) for name, t in times.items()}
    for name, t in times.items():
        line = {"op": "gae", "implementation": name, **vars(arguments), "median_seconds": median[name]}
        print(json.dumps(line | {"min_seconds": min(t), "times_faster_than_loop": median["loop"] / median[name]}))


if __name__ == "__main__":
    main()
