"""What fits on which card, from config.json alone: bench/results/memory-plans.jsonl, and from it a part of
docs/memory.md.

python bench/plan_shapes.py [SHAPE ...]
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fastppo import RunConfig
from fastppo.bench.machine import commit_of, versions
from fastppo.bench.pages import table
from fastppo.bench.records import Record, read
from fastppo.memory.plan import GIB, Plan, make_plan
from fastppo.memory.setting import parse_size, setting_of
from fastppo.run_file import from_dict

ROOT = Path(__file__).parent.parent
SHAPES = ROOT / "fastppo" / "bench" / "shapes"
RESULTS, PAGE = ROOT / "bench" / "results" / "memory-plans.jsonl", ROOT / "docs" / "memory.md"
BEGIN, END = "<!-- begin: bench/plan_shapes.py -->", "<!-- end: bench/plan_shapes.py -->"
ALL = ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b", "llama-3.1-8b")
CARDS = ("24GB", "80GB", "141GB")
RECOMPUTE = {"layers": {"checkpointing": "full"}}
SMALL_MOMENTS = {"kind": "adamw-8bit"}
SMALLEST = {"kind": "adamw-8bit", "masters": "stochastic"}
MOVED: dict[str, Any] = dict.fromkeys(("reference", "reward", "critic", "critic_optimizer", "policy_optimizer"), "move")
Tables = dict[str, dict[str, Any]]
FULL: dict[str, Tables] = {  # from the fastest to the smallest
    "as it is": {},
    "selective checkpointing": {"layers": {"checkpointing": "selective"}},
    "checkpointing": RECOMPUTE,
    "checkpointing, 8-bit moments": {
        **RECOMPUTE,
        **{"policy_optimizer": SMALL_MOMENTS, "critic_optimizer": SMALL_MOMENTS},
    },
    "checkpointing, 8-bit moments, stochastic rounding": {
        **RECOMPUTE,
        **{"policy_optimizer": SMALLEST, "critic_optimizer": SMALLEST},
    },
    "checkpointing, 8-bit moments, offload": {
        **RECOMPUTE,
        "offload": MOVED,
        **{"policy_optimizer": SMALL_MOMENTS, "critic_optimizer": SMALL_MOMENTS},
    },
    "checkpointing, 8-bit moments, stochastic rounding, offload": {
        **RECOMPUTE,
        "offload": MOVED,
        **{"policy_optimizer": SMALLEST, "critic_optimizer": SMALLEST},
    },
}
LORA: dict[str, Tables] = {
    "as it is": {"memory": {"share": "lora"}},
    "selective checkpointing": {"memory": {"share": "lora"}, "layers": {"checkpointing": "selective"}},
    "checkpointing": {"memory": {"share": "lora"}, **RECOMPUTE},
    "checkpointing, reward model streamed": {
        **{"memory": {"share": "lora"}, **RECOMPUTE, "offload": {"reward": "stream"}},
    },
}
LADDERS = {"all weights": FULL, "adapters": LORA}
TOKENS = (16384, 4096, 1024)


def run(shape: str, tables: Tables, max_tokens: int, *, reward: bool) -> RunConfig:
    """bfloat16, 64 prompts of 512 tokens, responses of 512, 4 minibatches."""
    path = str(SHAPES / shape)
    rewards = [{"kind": "function", "target": "rewards:score"}]
    if reward:
        rewards = [{"kind": "model", "target": path, "dtype": "bfloat16"}]
    sent = {key: way for key, way in tables.get("offload", {}).items() if reward or key != "reward"}
    settings = {
        "data": {"prompts": "prompts.jsonl", "max_prompt_tokens": 512},
        "rewards": rewards,
        "rollout": {"num_prompts": 64, "max_new_tokens": 512, "max_rows": 64},
        "ppo": {"num_minibatches": 4, "max_tokens_per_microbatch": max_tokens},
        **tables,
        "offload": sent,
    }
    return from_dict(RunConfig, {**settings, "policy": {"path": path, "dtype": "bfloat16"}})


def fitted(shape: str, ladder: dict[str, Tables], card: str, *, reward: bool) -> tuple[str, Plan]:
    """The first setting that fits, with the largest micro-batches that do; else the one that needs least."""
    found: list[tuple[str, Plan]] = []
    for name, tables in ladder.items():
        sizes = [_plan(shape, tables, card, max_tokens, reward=reward) for max_tokens in TOKENS]
        for plan in sizes:
            if plan.fits:
                return name, plan
        found += [(name, plan) for plan in sizes]
    return min(found, key=lambda one: one[1].needed)


def _plan(shape: str, tables: Tables, card: str, max_tokens: int, *, reward: bool) -> Plan:
    config = run(shape, tables, max_tokens, reward=reward)
    return make_plan(setting_of(config, torch.device("cuda")), parse_size(card))


def rows(shape: str) -> Iterator[Record]:
    """A record for every card, what is trained, and where rewards come from."""
    machine = {"device": "none: plans", "commit": commit_of(), "versions": versions()}
    for card, (what, ladder), reward in itertools.product(CARDS, LADDERS.items(), (True, False)):
        name, plan = fitted(shape, ladder, card, reward=reward)
        setting = {"card": card, "trained": what, "reward": "model" if reward else "function"}
        sizes = {"needed": plan.needed, "budget": plan.budget or 0, "host": plan.host_needed}
        yield {
            **{"suite": "memory plans", "op": shape, "setting": setting, "variant": name, "fits": plan.fits},
            **{"max_tokens": plan.setting.work.max_tokens, "phase": plan.peak.name},
            **{f"{name}_gib": round(size / GIB, 2) for name, size in sizes.items()},
            **{"parts_gib": {part: round(size / GIB, 2) for part, size in plan.peak.parts.most_common(4)}},
            "machine": machine,
        }


def section(records: Sequence[Record]) -> str:
    """What docs/memory.md says of them."""
    named = {f"commit {r['machine']['commit']}, torch {r['machine']['versions']['torch']}" for r in records}
    heading = ["shape", "card", "trained", "reward", "setting", "tokens", "", "GiB", "host, GiB", "largest parts, GiB"]
    made = [[r["op"], *r["setting"].values(), r["variant"], str(r["max_tokens"]), *_cells(r)] for r in records]
    return f"Made by `python bench/plan_shapes.py`: {'; '.join(sorted(named))}.\n\n{table(heading, made)}"


def _cells(r: Record) -> list[str]:
    parts = ", ".join(f"{part} {size:.1f}" for part, size in r["parts_gib"].items())
    sizes = f"{r['needed_gib']:.1f} of {r['budget_gib']:.1f}", f"{r['host_gib']:.1f}"
    return ["fits" if r["fits"] else "does not fit", *sizes, f"{r['phase']}: {parts}"]


def page(text: str, records: Sequence[Record]) -> str:
    """The page with the part between the marks made anew."""
    before, _, after = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{section(records)}\n{END}{after.partition(END)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=ALL, help="folders of bench/shapes; the others stay as they are")
    options = parser.parse_args()
    known = read(RESULTS) if RESULTS.exists() else []
    found = {shape: [r for r in known if r["op"] == shape] for shape in ALL}
    for shape in options.shapes:
        found[shape] = list(rows(shape))
        print(section(found[shape]), flush=True)
    records = [r for made in found.values() for r in made]
    RESULTS.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), records), encoding="utf-8")


if __name__ == "__main__":
    main()
