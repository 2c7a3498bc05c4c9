"""One PPO iteration by phase: rollout, reward, reference, values, advantages, update. `fastppo bench step`.

    fastppo bench step --shape qwen2.5-0.5b --lengths fixed long-tailed --device cuda
    fastppo bench step --sweep skew

Weights are random, so responses run to their limits. The clock stands in front of the engine's own methods: what is
timed is the iteration that `train` runs. `logprobs` is the forward of the policy that is needed where the sampler's
log-probs are not the trainer's (bfloat16). Floors and MFU: see `work`. Sweeps change one number of the setting and
interleave the settings that share a model; `x fixed` is a distribution's time over that of equal lengths with the same
number of tokens, the median over rounds.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import statistics
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import groupby
from typing import Any

import torch

from fastppo import OptimizerConfig, PPOConfig, PPOEngine, Prompts, RewardModel, RolloutConfig, WeightedRewards, models
from fastppo.bench import arguments, records, work
from fastppo.bench.clock import Clock
from fastppo.bench.lengths import lengths
from fastppo.bench.machine import machine, seconds_per_call, yardstick
from fastppo.bench.records import OURS, Record
from fastppo.bench.shapes import config_of, num_parameters
from fastppo.bench.step_settings import Setting, parser, settings
from fastppo.config_memory import MemoryConfig

PHASES = ("rollout", "reward", "logprobs", "reference", "values", "advantages", "update")
LARGEST_RATIO = {"float32": 1.01, "bfloat16": 1.2}  # of the policy to itself before the first step


def run(options: argparse.Namespace) -> list[Record]:
    """Measure, print and keep every setting; one that cannot run is a record that says why.

    Raises:
        ValueError: after all of them, if iterations of fastppo failed or did not do what they should.
    """
    made, failures = [], []
    missing = (s for s in settings(options) if not arguments.is_there(head(s, "iteration"), options))
    for _, group in groupby(missing, key=lambda s: s.model):
        chosen = list(group)
        why = cannot(chosen[0], options.device)
        try:
            lines = skipped(chosen, why) if why else measure(chosen, options, failures)
        except torch.OutOfMemoryError as error:
            lines = skipped(chosen, f"out of memory: {str(error).splitlines()[0]}")
        except Exception as error:  # the shapes after it are measured
            failures += arguments.failed([head(setting, "iteration") for setting in chosen], error, options)
            lines = []
        for setting in chosen:
            mine = [line for line in lines if line["setting"] == asdict(setting)]
            if mine:
                records.show(f"step  {records.setting_text(asdict(setting))}", mine, label="op")
        here = machine(options.device, options.seed, options.commit)
        records.append(options.out, [line | {"machine": here} for line in lines])
        made += lines
        gc.collect()
        if options.device != "cpu":
            torch.cuda.empty_cache()
    arguments.refuse(failures)
    return made


def cannot(setting: Setting, device: str) -> str | None:
    """Why a setting is not tried."""
    if setting.training == "lora" and importlib.util.find_spec("peft") is None:
        return "memory.share = 'lora' needs the package peft: pip install 'fastppo[lora]'"
    count = num_parameters(config_of(setting.shape, vocab_size=setting.vocab_size))
    size = 4 if setting.dtype == "float32" else 2
    learns = size + (12 if size == 4 else 16)  # gradient, moments, and masters of bfloat16
    needed = count * (2 * size if setting.training == "lora" else 2 * learns + 2 * size)
    there = memory_bytes(device)
    if needed <= there:
        return None
    return f"weights, gradients and Adam's moments of all models take {needed / 2**30:.0f} of {there / 2**30:.0f} GiB"


def memory_bytes(device: str) -> int:
    """Of the device."""
    if device != "cpu":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def skipped(chosen: list[Setting], why: str) -> list[Record]:
    return [head(setting, "iteration") | {"skipped": why} for setting in chosen]


def head(setting: Setting, op: str) -> Record:
    return {"suite": "step", "op": op, "setting": asdict(setting), "variant": OURS}


def build(setting: Setting, device: str, seed: int) -> tuple[PPOEngine, WeightedRewards, work.Sizes]:
    """Policy, reference, critic and reward model with random weights; LoRA: the first three share theirs."""
    torch.manual_seed(seed)
    with torch.device(device):
        policy = models.new_causal_lm(config_of(setting.shape, vocab_size=setting.vocab_size), setting.dtype)
    policy = models.prepare_policy(policy)
    reward, sizes = RewardModel(models.frozen(models.reward_model_from(policy))), work.Sizes.of(policy)
    if setting.training == "lora":
        policy = models.adapt(policy, MemoryConfig(share="lora"), seed=seed)
    optimizer = OptimizerConfig(lr=1e-6, schedule="constant")
    engine = PPOEngine(
        policy,
        ppo=PPOConfig(
            num_epochs=setting.epochs,
            num_minibatches=setting.minibatches,
            max_tokens_per_microbatch=setting.max_tokens,
            truncation="none",
        ),
        rollout=RolloutConfig(num_prompts=setting.prompts, temperature=1.0, max_new_tokens=setting.response_tokens),
        policy_optimizer=optimizer,
        critic_optimizer=optimizer,
        seed=seed,
    )
    return engine, WeightedRewards([reward]), sizes


def batch_of(setting: Setting, seed: int) -> tuple[Prompts, work.Batch]:
    """Random prompts with a limit each, and the lengths that come of them."""
    generator = torch.Generator().manual_seed(seed)
    first = lengths(setting.lengths, setting.prompts, setting.prompt_tokens, generator)
    limits = lengths(setting.lengths, setting.prompts, setting.response_tokens, generator)
    ids = (torch.randint(setting.vocab_size, (n,), generator=generator).tolist() for n in first)
    return Prompts(token_ids=tuple(tuple(row) for row in ids), limits=tuple(limits)), work.Batch(first, limits)


def iterate(engine: PPOEngine, rewards: WeightedRewards, prompts: Prompts, clock: Clock) -> dict[str, float]:
    """One iteration as `train` runs it; what is left of `score` beside the models is `advantages`."""
    with clock("rollout"):
        rollout = engine.generate(prompts)
    with clock("reward"):
        scores = rewards(rollout)
    with clock("advantages"):
        experience = engine.score(rollout, scores)
    with clock("update"):
        return engine.update(experience)


def timed_inside(engine: PPOEngine, clock: Clock) -> None:
    """The forwards that `score` makes count as phases of their own."""
    for name in ("_logprobs", "_values"):
        vars(engine).pop(name, None)  # the clock of the iteration before
    clock.around(engine, "_logprobs", lambda model, _: "reference" if model is engine.reference else "logprobs")
    clock.around(engine, "_values", lambda *_: "values")


def measure(chosen: list[Setting], options: argparse.Namespace, failures: list[str]) -> list[Record]:
    """Records of settings that share a model: a checked iteration each, then rounds of all of them in turn.

    A setting whose iteration did not do what it should is not timed and added to `failures`.
    """
    engine, rewards, sizes = build(chosen[0], options.device, options.seed)
    batches = {setting: batch_of(setting, options.seed) for setting in chosen}
    peaks: dict[Setting, dict[str, float]] = {}
    for s in chosen:
        try:
            peaks[s] = checked(engine, rewards, batches[s][0], s, options.device)
        except ValueError as error:
            failures += arguments.failed([head(s, "iteration")], error, options)
    chosen = list(peaks)
    times: dict[Setting, list[dict[str, float]]] = {setting: [] for setting in chosen}
    stick, ticks = yardstick(options.device), []
    stick()
    for _ in range(options.rounds):
        ticks.append(seconds_per_call(stick, 1, options.device)[0])
        for setting in chosen:
            configure(engine, setting)
            clock = Clock(options.device)
            timed_inside(engine, clock)
            iterate(engine, rewards, batches[setting][0], clock)
            times[setting].append(clock.seconds)
    state = work.step_bytes(role for _, role in engine._roles())
    lines = [
        line
        for s in chosen
        for line in phase_records(s, times[s], batches[s][1], sizes, state, options.device, peaks[s], ticks)
    ]
    return with_skew(lines)


def configure(engine: PPOEngine, setting: Setting) -> None:
    """Settings that share a model differ in the lengths and the number of prompts."""
    engine.config = replace(engine.config, num_prompts=setting.prompts, max_new_tokens=setting.response_tokens)


def checked(
    engine: PPOEngine, rewards: WeightedRewards, prompts: Prompts, setting: Setting, device: str
) -> dict[str, float]:
    """Run an iteration that is not timed; the peak memory of its phases."""
    clock = Clock(device, memory=True)
    configure(engine, setting)
    timed_inside(engine, clock)
    with clock.sampling():
        stats = iterate(engine, rewards, prompts, clock)
    ratio, steps = stats["val/ratio_max_first"], stats["policy/steps"]
    if not (ratio <= LARGEST_RATIO[setting.dtype] and steps == setting.epochs * setting.minibatches):
        raise ValueError(f"not timed: {steps:.0f} optimizer steps, and a ratio of {ratio:.3g} before the first one")
    return clock.peak_bytes


def phase_records(
    setting: Setting, rounds: list[dict[str, float]], batch: work.Batch, sizes: work.Sizes, state: float, device: str,
    peaks: dict[str, float], ticks: list[float],
) -> Iterator[Record]:  # fmt: skip
    """A record for each phase that ran, and one for the iteration."""
    options: dict[str, Any] = {"epochs": setting.epochs, "minibatches": setting.minibatches, "state_bytes": state}
    options["trains_base"] = setting.training == "full"
    parts = work.phases(sizes, batch, sizes.dtype, rows=min(512, setting.prompts), **options)
    ran = [phase for phase in PHASES if phase in rounds[0]]
    parts["iteration"] = work.together((parts[phase] for phase in ran), batch.tokens)
    for op in (*ran, "iteration"):
        seconds = [sum(r.values()) if op == "iteration" else r[op] for r in rounds]
        yield head(setting, op) | {
            **records.numbers(seconds, parts[op], device),
            "peak_mb": records.short(max(peaks.values()) / 2**20 if op == "iteration" else peaks[op] / 2**20),
            records.YARDSTICK: [records.short(1e3 * x) for x in ticks],
        }


def with_skew(lines: list[Record]) -> list[Record]:
    """`times_fixed` for every distribution that was measured beside equal lengths."""

    def key(line: Record) -> tuple[Any, ...]:
        return line["op"], *(v for k, v in line["setting"].items() if k != "lengths")

    fixed = {key(line): line["rounds_ms"] for line in lines if line["setting"]["lengths"] == "fixed"}
    for line in lines:
        if key(line) in fixed and line["setting"]["lengths"] != "fixed":
            pairs = zip(line["rounds_ms"], fixed[key(line)], strict=True)
            line["times_fixed"] = records.short(statistics.median(a / b for a, b in pairs))
    return lines


def main(argv: list[str] | None = None) -> None:
    options = arguments.start(parser(__doc__), argv)
    if options.quick:
        options.prompts, options.prompt_tokens, options.response_tokens = 8, 4, 6
        options.rounds, options.minibatches, options.vocab_size, options.shape = 3, 2, 512, ["tiny"]
    run(options)
