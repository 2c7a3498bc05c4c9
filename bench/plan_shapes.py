"""What fits on which card, from config.json alone: the table of docs/memory.md, as Markdown.

python bench/plan_shapes.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from fastppo import RunConfig
from fastppo.memory.plan import GIB, Plan, make_plan
from fastppo.memory.setting import parse_size, setting_of
from fastppo.run_file import from_dict

SHAPES = Path(__file__).parent.parent / "fastppo" / "bench" / "shapes"
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
    least: list[Plan] = []
    for name, tables in ladder.items():
        smallest = _plan(shape, tables, card, TOKENS[-1], reward=reward)
        least.append(smallest)
        if smallest.fits:
            sizes = (_plan(shape, tables, card, max_tokens, reward=reward) for max_tokens in TOKENS)
            best = next(plan for plan in sizes if plan.fits)
            return f"{name}, {best.setting.work.max_tokens} tokens", best
    return "does not fit", min(least, key=lambda plan: plan.needed)


def _plan(shape: str, tables: Tables, card: str, max_tokens: int, *, reward: bool) -> Plan:
    config = run(shape, tables, max_tokens, reward=reward)
    return make_plan(setting_of(config, torch.device("cuda")), parse_size(card))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=ALL, help="folders of bench/shapes")
    options = parser.parse_args()
    print("| shape | card | what is trained | reward | setting | GiB | largest parts, GiB |")
    print("|---|---|---|---|---|---|---|")
    for shape in options.shapes:
        for card in CARDS:
            for what, ladder in (("all weights", FULL), ("adapters", LORA)):
                for reward in (True, False) if shape == "llama-3.1-8b" else (True,):
                    name, plan = fitted(shape, ladder, card, reward=reward)
                    parts = ", ".join(f"{part} {size / GIB:.1f}" for part, size in plan.peak.parts.most_common(4))
                    of = "model" if reward else "function"
                    cells = (shape, card, what, of, name, f"{plan.needed / GIB:.1f}", f"{plan.peak.name}: {parts}")
                    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
