"""Sampling responses of very different lengths: the embedded engine beside transformers' generate and generate_batch.

    python bench/bench_rollout.py [--models tiny mid] [--dtypes float32 bfloat16] [--device cuda] [--out FILE]

Prompts of 16 to 64 tokens; response lengths 16 + 240 u^3 (u uniform), no end-of-sequence token, temperature 1. Random
weights: tiny is Qwen2 of hidden 256 x 4 layers, mid of 768 x 12. What is counted are the tokens that were asked for;
`generate` has one limit for all and runs to the longest. Before anything is timed, the engine's log-probs are held
against the trainer's own forward. Runs alternate. On the CPU the figure is CPU seconds of the process on
one thread, which other load disturbs less than the wall clock; on a GPU wall seconds. There a step reads at least the
weights and the live keys and values: `floor` is how much of the time that would take at the measured copy rate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import copy_rate, machine
from transformers import ContinuousBatchingConfig, GenerationConfig, Qwen2Config

from fastppo import Prompts, Sampling, models
from fastppo.attention import PACKED
from fastppo.rollout import EmbeddedEngine
from fastppo.score import action_logprobs

VOCAB = 8192
SHAPES = {  # hidden, layers, heads, kv heads, intermediate, requests on a CPU
    "tiny": (256, 4, 4, 2, 1024, 64),
    "mid": (768, 12, 12, 4, 3072, 32),
    "0.5B": (896, 24, 14, 2, 4864, 256),
}
ATTENTION = {"fastppo": PACKED, "generate": "sdpa", "generate_batch": "paged|eager"}  # the quickest of each on a CPU
LARGEST_GAP = {torch.float32: 1e-5, torch.bfloat16: 0.2}  # nats


def make_policy(name: str, dtype: torch.dtype, device: str) -> Any:
    hidden, layers, heads, kv_heads, intermediate, _ = SHAPES[name]
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return models.prepare_policy(models.new_causal_lm(config).to(device=torch.device(device), dtype=dtype))  # pyright: ignore


def make_requests(count: int) -> Prompts:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(16, 65, (count,), generator=generator).tolist()
    limits = (16 + 240 * torch.rand(count, generator=generator) ** 3).long().tolist()
    ids = [tuple(torch.randint(1, VOCAB, (n,), generator=generator).tolist()) for n in lengths]
    return Prompts(token_ids=tuple(ids), limits=tuple(limits))


def generate(policy: Any, requests: Prompts) -> None:
    """transformers' own loop over a left-padded batch."""
    T = max(len(p) for p in requests.token_ids)
    ids = torch.tensor([[0] * (T - len(p)) + list(p) for p in requests.token_ids], device=policy.device)
    mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in requests.token_ids], device=policy.device)
    options = GenerationConfig(do_sample=True, max_new_tokens=max(requests.limits), pad_token_id=0, top_k=0)
    policy.generate(input_ids=ids, attention_mask=mask, generation_config=options)


def generate_batch(policy: Any, requests: Prompts) -> None:
    """transformers' continuous batching, a limit for each request; sized for this workload, as its default is not."""
    blocks = ContinuousBatchingConfig(
        page_size=32, num_blocks=16 * len(requests), max_batch_tokens=1024, return_logprobs=True
    )
    options = GenerationConfig(do_sample=True, max_new_tokens=max(requests.limits), top_k=0)
    with policy.continuous_batching_context_manager(
        generation_config=options, continuous_batching_config=blocks
    ) as manager:
        for i, (ids, limit) in enumerate(zip(requests.token_ids, requests.limits, strict=True)):
            manager.add_request(list(ids), request_id=str(i), max_new_tokens=limit)
        made = [manager.get_result() for _ in requests.token_ids]
    counts = sorted(len(r.generated_tokens) for r in made)
    assert counts == sorted(requests.limits), "generate_batch lost tokens"


def seconds(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def floor_seconds(policy: Any, requests: Prompts, rows: int, device: str) -> float:
    """Weights once a step, and every live key and value once a step, at the rate of a copy."""
    steps = max(max(requests.limits), sum(requests.limits) / rows)
    weights = sum(p.numel() * p.element_size() for p in policy.parameters())
    live = sum(m * len(p) + m * m / 2 for p, m in zip(requests.token_ids, requests.limits, strict=True))
    return (steps * weights + live * models.kv_bytes_per_token(policy)) / copy_rate(device)


def bench(name: str, dtype: torch.dtype, options: argparse.Namespace) -> dict[str, Any]:
    policy, requests = make_policy(name, dtype, options.device), make_requests(options.requests or SHAPES[name][-1])
    engine = EmbeddedEngine(policy, max_rows=options.rows)
    rollout = engine.generate(requests, Sampling(seed=0))
    ours = action_logprobs(policy, rollout, temperature=1.0, max_tokens=4096)
    assert rollout.logprobs is not None
    gap = float((ours - rollout.logprobs).abs().max())
    if not gap <= LARGEST_GAP[dtype]:
        raise SystemExit(f"{name} {dtype}: log-probs are {gap:.3g} nats off the trainer's; nothing was timed")
    runs: dict[str, Callable[[], object]] = {
        "fastppo": lambda: engine.generate(requests, Sampling()),
        "generate": lambda: generate(policy, requests),
        "generate_batch": lambda: generate_batch(policy, requests),
    }
    times: dict[str, list[float]] = {variant: [] for variant in runs}
    for round_ in range(options.rounds + 1):
        for variant, run in runs.items():
            policy.eval()
            policy.set_attn_implementation(ATTENTION[variant])
            elapsed = seconds(run, options.device)
            times[variant] += [elapsed] if round_ else []  # the first warms up
    tokens, best = sum(requests.limits), {k: statistics.median(v) for k, v in times.items()}
    print(f"\n{name} {dtype}, {len(requests)} requests, {tokens} tokens; largest log-prob gap {gap:.2g} nats")
    for variant, value in best.items():
        print(f"  {variant:15} {value:8.2f} s {tokens / value:9.0f} tokens/s   {value / best['fastppo']:.2f}x")
    row = {"op": "rollout", "model": name, "dtype": str(dtype).split(".")[1], "requests": len(requests)}
    row |= {"tokens": tokens, "gap": gap, "seconds": times, "median_seconds": best}
    if options.device == "cuda":
        row["floor"] = floor_seconds(policy, requests, options.rows, options.device) / best["fastppo"]
        print(f"  {row['floor']:.0%} of the bandwidth floor")
    return row | machine(options.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["tiny"])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--requests", type=int, help="default: 64, 32, 256 for tiny, mid, 0.5B")
    parser.add_argument("--rows", type=int, default=256, help="sequences decoded at a time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    options = parser.parse_args()
    torch.set_num_threads(1 if options.device == "cpu" else torch.get_num_threads())
    for name in options.models:
        for dtype in options.dtypes:
            row = bench(name, getattr(torch, dtype), options)
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
