"""PPO from logits, forward and gradient, on the CPU: fastppo's row kernel against plain PyTorch and torch.compile.

    python bench/bench_rows_cpu.py [--rows 1024] [--vocab-size 151936] [--rounds 15] [--no-compile]

The values of every variant are checked against float64 first. Then the variants take turns, round by round, so that a
busy moment of the machine meets all of them; a copy of the logits takes its turn too, because reading and writing the
logits once each (8 bytes per float32 element, 4 per bfloat16) is the least that anybody can do. Prints a table of
minima and one JSON line per variant.

The peers allocate gigabytes in every call, and glibc gives such blocks back to the kernel at once, so most of their
time goes into page faults. MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=60000000000 in the environment makes it keep them.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastppo_kernels import reference
from fastppo_kernels.native import rows as native
from fastppo_kernels.reference import PPORows
from fastppo_kernels.settings import HeadSettings, PPOSettings

HEAD = HeadSettings()


class Problem(NamedTuple):
    """One batch; `source` are the rows that `logits` is filled with again and again."""

    source: Tensor  # (64, V)
    logits: Tensor  # (R, V)
    targets: Tensor  # (R,)
    rows: PPORows


def make_problem(num_rows: int, vocab_size: int, dtype: torch.dtype) -> Problem:
    torch.manual_seed(0)
    source = (2 * torch.randn(64, vocab_size)).to(dtype)
    targets = torch.randint(vocab_size, (num_rows,))
    advantages, weights = torch.randn(num_rows), torch.full((num_rows,), 1.0 / num_rows)
    old = source.float().log_softmax(1)[torch.arange(num_rows) % 64, targets] + 0.2 * torch.randn(num_rows)
    problem = Problem(
        source, torch.empty(num_rows, vocab_size, dtype=dtype), targets, PPORows(old, advantages, weights)
    )
    refill(problem)
    return problem


def refill(p: Problem) -> None:
    """The logits as they were: the in-place kernel leaves gradients in them."""
    for start in range(0, p.logits.shape[0], 64):
        rows = p.logits[start : start + 64]
        rows.copy_(p.source[: rows.shape[0]])


def plain_loss(logits: Tensor, targets: Tensor, rows: PPORows, entropy_coef: float) -> Tensor:
    """What a PPO trainer writes in PyTorch."""
    logp = torch.log_softmax(logits.double() if logits.dtype == torch.float64 else logits.float(), dim=-1)
    picked = logp.gather(-1, targets[:, None]).squeeze(-1)
    assert rows.old_logprobs is not None
    ratio = (picked - rows.old_logprobs).exp()
    loss = torch.maximum(-rows.advantages * ratio, -rows.advantages * ratio.clamp(0.8, 1.2))
    if entropy_coef:
        loss = loss + entropy_coef * (logp.exp() * logp).sum(-1)
    return (rows.weights * loss).sum()


def by_autograd(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(logits: Tensor, targets: Tensor, rows: PPORows, entropy_coef: float) -> Tensor:
        leaf = logits.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf, targets, rows, entropy_coef), leaf)[0]

    return run


def fused(logits: Tensor, targets: Tensor, rows: PPORows, entropy_coef: float) -> Tensor:
    settings = PPOSettings(entropy_coef=entropy_coef)
    native.ppo_rows(logits, targets, rows, settings, HEAD, entropy=entropy_coef != 0.0, dlogits=logits)
    return logits


def check(name: str, run: Callable[..., Tensor], p: Problem, entropy_coef: float) -> None:
    """Raise AssertionError unless the gradient of some rows is float64's, to the precision of the logits' dtype."""
    few = min(64, p.logits.shape[0])
    some = (p.targets[:few], p.rows.take(slice(few)))
    truth = by_autograd(plain_loss)(p.source[:few].double(), *some, entropy_coef)
    error = (run(p.source[:few].clone(), *some, entropy_coef).double() - truth).abs().max() / truth.abs().max()
    assert error < (4e-3 if p.logits.dtype == torch.bfloat16 else 4e-6), f"{name}: relative error {error:.1e}"
    logprobs, _ = native.logprob_rows(p.source[:few], some[0], HEAD, entropy=False)
    exact, _ = reference.logits_token_logprobs(p.source[:few].double(), some[0], HEAD, entropy=False)
    assert (logprobs - exact).abs().max() < 5e-6


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(
    p: Problem, variants: dict[str, Callable[..., Tensor]], entropy_coef: float, rounds: int
) -> dict[str, list]:
    """Seconds of every variant and of "copy", by name; each round runs each of them once, the quick ones five times."""
    times: dict[str, list[float]] = {"copy": []} | {name: [] for name in variants}
    other = torch.empty_like(p.logits)
    for _ in range(rounds):
        times["copy"] += [seconds(lambda: other.copy_(p.logits)) for _ in range(5)]
        for name, run in variants.items():
            for _ in range(5 if run is fused else 1):
                refill(p)
                times[name].append(seconds(lambda run=run: run(p.logits, p.targets, p.rows, entropy_coef)))
    return times


def report(p: Problem, times: dict[str, list[float]], entropy: bool) -> None:
    size = 2 * p.logits.numel() * p.logits.element_size()  # read once, written once
    best = {name: min(t) for name, t in times.items()}
    title = f"{p.logits.dtype} entropy={entropy}".removeprefix("torch.")
    print(f"\n{title:32s} {'min ms':>9s} {'GB/s':>7s} {'of copy':>8s} {'fastppo is':>11s}")
    for name, t in times.items():
        rate, of_copy, ratio = size / best[name] / 1e9, best["copy"] / best[name], best[name] / best["fastppo"]
        print(f"{name:32s} {1e3 * best[name]:9.1f} {rate:7.1f} {of_copy:7.0%} {ratio:10.1f}x")
        line = {
            "op": "ppo_rows",
            "variant": name,
            "dtype": str(p.logits.dtype).removeprefix("torch."),
            "entropy": entropy,
            "R": p.logits.shape[0],
            "V": p.logits.shape[1],
            "min_ms": round(1e3 * best[name], 2),
            "median_ms": round(1e3 * statistics.median(t), 2),
            "gb_per_s": round(rate, 2),
            "isa": list(native.available_isas())[list(native.available_isas().values()).index(native.chosen_isa())],
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "machine": platform.machine(),
        }
        print(json.dumps(line))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=151936)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    for dtype in (torch.float32, torch.bfloat16):
        p = make_problem(options.rows, options.vocab_size, dtype)
        for entropy_coef in (0.0, 0.01):
            variants = {"fastppo": fused, "torch eager": by_autograd(plain_loss)}
            if not options.no_compile:
                variants["torch.compile"] = by_autograd(torch.compile(plain_loss, dynamic=False))
            for name, run in variants.items():
                check(name, run, p, entropy_coef)
            report(p, measure(p, variants, entropy_coef, options.rounds), entropy_coef != 0.0)


if __name__ == "__main__":
    main()
