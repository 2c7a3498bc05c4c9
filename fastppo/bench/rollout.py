"""Sampling responses of very different lengths: the embedded engine beside transformers' generate and generate_batch.

    fastppo bench rollout [--models tiny mid] [--dtypes float32 bfloat16] [--device cuda] [--out FILE]

On a CPU a float32 case also runs `fastppo bfloat16`: the same weights and requests in bfloat16, in turn with the rest.
Prompts of 16 to 64 tokens; response lengths 16 + 240 u^3 (u uniform), no end-of-sequence token, temperature 1. Random
weights: tiny is Qwen2 of hidden 256 x 4 layers, mid of 768 x 12. What is counted are the tokens that were asked for;
`generate` has one limit for all and runs to the longest. Before anything is timed, the engine's log-probs are held
against the trainer's own forward. On the CPU compare `CPU ms` too: other load disturbs it less than the wall clock. A
step reads at least the weights and the live keys and values: that is the floor.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, Qwen2Config

from fastppo import Prompts, Sampling, models
from fastppo.attention import PACKED
from fastppo.bench import arguments, harness
from fastppo.bench.harness import Case, Outputs, Variant
from fastppo.bench.work import Sizes
from fastppo.rollout import EmbeddedEngine
from fastppo.rollout.generate_batch import PAGES
from fastppo.score import action_logprobs

VOCAB = 8192
SHAPES = {  # hidden, layers, heads, kv heads, intermediate, requests on a CPU
    "tiny": (256, 4, 4, 2, 1024, 64),
    "mid": (768, 12, 12, 4, 3072, 32),
    "0.5B": (896, 24, 14, 2, 4864, 256),
}
ATTENTION = {"fastppo": PACKED, "generate": "sdpa"}
PAGED = {"cpu": "paged|eager", "cuda": "sdpa"}  # of generate_batch; with flash-attn it takes that by itself on a GPU
HALF = "fastppo bfloat16"
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
    return models.prepare_policy(models.new_causal_lm(config).to(device=torch.device(device), dtype=dtype))  # pyright: ignore


def make_requests(count: int) -> Prompts:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(16, 65, (count,), generator=generator).tolist()
    limits = (16 + 240 * torch.rand(count, generator=generator) ** 3).long().tolist()
    ids = [tuple(torch.randint(1, VOCAB, (n,), generator=generator).tolist()) for n in lengths]
    return Prompts(token_ids=tuple(ids), limits=tuple(limits))


def fastppo(engine: EmbeddedEngine, requests: Prompts) -> Mapping[str, Any]:
    return {"rollout": engine.generate(requests, Sampling())}


def generate(policy: Any, requests: Prompts) -> Outputs:
    """transformers' own loop over a left-padded batch."""
    T = max(len(p) for p in requests.token_ids)
    ids = torch.tensor([[0] * (T - len(p)) + list(p) for p in requests.token_ids], device=policy.device)
    mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in requests.token_ids], device=policy.device)
    options = GenerationConfig(do_sample=True, max_new_tokens=max(requests.limits), pad_token_id=0, top_k=0)
    return {"ids": policy.generate(input_ids=ids, attention_mask=mask, generation_config=options)}


def generate_batch(policy: Any, requests: Prompts) -> Outputs:
    """transformers' continuous batching, a limit for each request; sized for this workload, as its default is not."""
    sizes: dict[str, Any] = {PAGES: 32, "num_blocks": 16 * len(requests), "max_batch_tokens": 1024}
    blocks = ContinuousBatchingConfig(**sizes, return_logprobs=True)
    options = GenerationConfig(do_sample=True, max_new_tokens=max(requests.limits), top_k=0)
    with policy.continuous_batching_context_manager(
        generation_config=options, continuous_batching_config=blocks
    ) as manager:
        for i, (ids, limit) in enumerate(zip(requests.token_ids, requests.limits, strict=True)):
            manager.add_request(list(ids), request_id=str(i), max_new_tokens=limit)
        made = [manager.get_result() for _ in requests.token_ids]
    counts = sorted(len(r.generated_tokens) for r in made)
    assert counts == sorted(requests.limits), "generate_batch lost tokens"
    return {}


def log_prob_gap(policy: Any, outputs: Mapping[str, Any]) -> Outputs:
    """The engine's log-probs less the trainer's for the same tokens, over what is allowed."""
    rollout = outputs["rollout"]
    theirs = action_logprobs(policy, rollout, temperature=1.0, max_tokens=4096)
    return {"gap": (rollout.logprobs - theirs).double() / LARGEST_GAP[policy.dtype]}


def with_attention(policy: Any, variant: str) -> Callable[[], None]:
    """What must be done, untimed, before a variant samples."""

    def before() -> None:
        policy.eval()
        policy.set_attn_implementation(ATTENTION.get(variant) or PAGED[policy.device.type])

    return before


def in_bfloat16(policy: Any, requests: Prompts, rows: int) -> Variant:
    """The same weights, rounded."""
    half = copy.deepcopy(policy)
    for p in half.parameters():
        p.data = p.data.bfloat16()
    return Variant(
        run=partial(fastppo, EmbeddedEngine(half, max_rows=rows), requests),
        pick=partial(log_prob_gap, half),
        note="weights rounded to bfloat16",
        num_bytes=least_bytes(Sizes.of(half), requests, rows),
        dtype=torch.bfloat16,
    )


def least_bytes(sizes: Sizes, requests: Prompts, rows: int) -> float:
    """Weights once a step, and every live key and value once a step."""
    steps = max(max(requests.limits), sum(requests.limits) / rows)
    live = sum(m * len(p) + m * m / 2 for p, m in zip(requests.token_ids, requests.limits, strict=True))
    return steps * sizes.weight_bytes(True) + live * sizes.kv_bytes


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for name in ["tiny"] if options.quick else options.models:
        for dtype in (getattr(torch, chosen) for chosen in options.dtypes):
            policy = make_policy(name, dtype, options.device)
            requests = make_requests(8 if options.quick else options.requests or SHAPES[name][-1])
            engine, sizes = EmbeddedEngine(policy, max_rows=options.rows), Sizes.of(policy)
            zero = torch.zeros(sum(requests.limits), dtype=torch.float64, device=options.device)
            runs = {harness.OURS: partial(fastppo, engine), "generate": partial(generate, policy)}
            runs["generate_batch"] = partial(generate_batch, policy)
            variants: dict[str, Variant | str] = {
                variant: Variant(
                    run=partial(run, requests),
                    before=with_attention(policy, variant),
                    truth=None if variant == harness.OURS else {},
                    graph=False,
                )
                for variant, run in runs.items()
            }
            if dtype == torch.float32 and options.device == "cpu":
                variants[HALF] = in_bfloat16(policy, requests, options.rows)
            yield Case(
                suite="rollout",
                op="generate",
                setting={"model": name, "dtype": str(dtype).split(".")[1], "requests": len(requests)}
                | {"tokens": sum(requests.limits), "rows": options.rows},
                variants=variants,
                truth={"gap": zero},
                pick=partial(log_prob_gap, policy),
                tolerance=1.0,
                num_bytes=least_bytes(sizes, requests, options.rows),
                flops=sizes.forward(_totals(requests), sum(requests.limits)),
                dtype=dtype,
                tokens=sum(requests.limits),
            )


def _totals(requests: Prompts) -> list[int]:
    return [len(p) + m for p, m in zip(requests.token_ids, requests.limits, strict=True)]


def parser() -> argparse.ArgumentParser:
    made = arguments.parser(__doc__, repeats=5)
    made.set_defaults(dtypes=["bfloat16" if torch.cuda.is_available() else "float32"])
    made.add_argument("--models", nargs="+", choices=SHAPES, default=["tiny"])
    made.add_argument("--requests", type=int, help="default: 64, 32, 256 for tiny, mid, 0.5B")
    made.add_argument("--rows", type=int, default=256, help="sequences decoded at a time")
    return made
