"""Ways to fit: changes of a run file's keys, the cheapest first, each tried by another plan."""

import importlib.util
import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from fastppo import distributed
from fastppo.checks import InputError
from fastppo.config import RunConfig
from fastppo.config_offload import OffloadConfig
from fastppo.memory.plan import Plan, Setting, floor, make_plan
from fastppo.memory.setting import has_full_reward, setting_of

MOST_WAYS, MOST_CHANGES = 3, 3
SILENT_S = 5.0  # of a search
RECOMPUTED, EVERY = "layers.checkpointing", "layers.checkpoint_every"
KEY_OF = {"max_tokens": "ppo.max_tokens_per_microbatch", "max_rows": "rollout.max_rows"}
GIVEN_UP_BY = {"ppo.advantage": ("critic_optimizer.", "offload.critic"), "ppo.kl_coef": ("offload.reference",)}
KEYS = tuple(f.name for f in fields(OffloadConfig))


@dataclass(frozen=True)
class Way:
    """Keys and their values, what they cost, and the plan with them."""

    keys: dict[str, object]
    cost: str
    plan: Plan


@dataclass(frozen=True)
class Change:
    """One thing to give up. The costlier, the later it is tried."""

    keys: dict[str, object]
    cost: str
    price: int


def ways_to_fit(config: RunConfig, plan: Plan) -> list[Way]:
    """The cheapest changes with which the run fits, at most three, none of them more than another needs.

    Micro-batches and rows, which change no result, are made as small as it takes and left as large as they can be.
    """
    found: list[Way] = []
    since, told = time.monotonic(), False
    device = plan.setting.device.type
    known = [*(_offloads(config) if device == "cuda" else ()), *_changes(config, device)]
    if plan.setting.copies_to_save and (device == "cpu" or plan.setting.host_memory is not None):
        known.append(Change({"train.async_save": False}, "training waits while a checkpoint is written", 1))
    for changes in _combinations(known):
        keys = _of_those_left({key: value for change in changes for key, value in change.keys.items()})
        if any(_same_changes(way, mild) for way in found for mild in (keys, *_milder(keys))):
            continue
        made = _tried(config, keys, plan)
        if not told and distributed.rank() == 0 and time.monotonic() > since + SILENT_S:
            told = True
            print("it does not fit; looking for settings that do", file=sys.stderr, flush=True)
        if made is not None:
            portions, fitted = made
            keys, fitted = _without_spare(config, keys, portions, fitted)
            cost = "; ".join([c.cost for c in changes] + ["smaller portions, the same results"] * bool(portions))
            found.append(Way(keys | portions, cost, fitted))
        if len(found) == MOST_WAYS:
            break
    return found


def can_fit(setting: Setting, budget: int | None) -> bool:
    """Whether some portions do. One row and the micro-batches as written may where one sequence at a time does not: a
    minibatch that is cut keeps its gradient beside the next backward pass."""
    return any(make_plan(made, budget).fits for made in (setting, _portions(setting, max_rows=1), least(setting)))


def least(setting: Setting) -> Setting:
    """The same in the smallest portions: one sequence in a micro-batch, one row in the sampler."""
    return _portions(setting, max_tokens=setting.work.longest, max_rows=1)


def _portions(setting: Setting, **sizes: int) -> Setting:
    return replace(setting, work=replace(setting.work, **sizes))


def changed(config: RunConfig, keys: dict[str, object]) -> RunConfig:
    """The config with dotted keys replaced."""
    tables: dict[str, dict[str, object]] = {}
    for key, value in keys.items():
        table, _, name = key.partition(".")
        tables.setdefault(table, {})[name] = value
    made = {table: replace(getattr(config, table), **values) for table, values in tables.items()}
    return replace(config, **made)


def _changes(config: RunConfig, device: str) -> Iterator[Change]:
    critic = config.ppo.advantage == "gae"
    yield from _recomputation(config, device)
    if config.rollout.keep_memory:
        yield Change({"rollout.keep_memory": False}, "memory for sampling is made anew for every rollout", 1)
    if config.ppo.roll_back:
        yield Change({"ppo.roll_back": False}, "an update that drifts too far stops and is not undone", 2)
    yield from _optimizers(config)
    if config.policy.dtype == "float32":
        yield Change({"policy.dtype": "bfloat16"}, "the models compute in bfloat16", 3)
    if critic:
        keys: dict[str, object] = {} if config.critic.init == "policy" else {"critic.init": "policy"}
        keys |= {"ppo.advantage": "reinforce++", **_kept(config, "critic", "critic_optimizer")}
        yield Change(keys, "no critic: another estimator of advantages", 5)
    if config.ppo.kl_coef > 0 and config.ppo.kl_target is None:
        keys = {"ppo.kl_coef": 0.0, **_kept(config, "reference")}
        yield Change(keys, "no reference: nothing holds the policy to where it began", 6)


def _recomputation(config: RunConfig, device: str) -> Iterator[Change]:
    """Alternatives, the mildest first."""
    now = config.layers.checkpointing
    every: dict[str, object] = {} if config.layers.checkpoint_every == 1 else {EVERY: 1}
    if now == "none":
        yield Change({RECOMPUTED: "selective"}, "norms and activation functions are computed twice in the update", 1)
    if now != "full" or every:
        yield Change({RECOMPUTED: "full", **every}, "layers are computed twice: a third more compute in the update", 2)
    if device == "cuda" and not config.layers.offload_activations:
        keys = {RECOMPUTED: "full", **every, "layers.offload_activations": True}
        yield Change(keys, "layers are computed twice, from inputs that the update copies to the host and back", 3)


def _of_those_left(keys: dict[str, object]) -> dict[str, object]:
    """Without keys of a model that is given up by another of them."""
    gone = tuple(prefix for key in keys for prefix in GIVEN_UP_BY.get(key, ()))
    return {key: value for key, value in keys.items() if value == "keep" or not key.startswith(gone)}


def _kept(config: RunConfig, *given_up: str) -> dict[str, object]:
    """What is to be moved no longer, where there will be nothing to move."""
    return {f"offload.{key}": "keep" for key in given_up if getattr(config.offload, key) != "keep"}


def _milder(keys: dict[str, object]) -> list[dict[str, object]]:
    """The same with less given up in the layers."""
    if keys.get(RECOMPUTED) != "full":
        return []
    kept = {key: value for key, value in keys.items() if key != "layers.offload_activations"}
    return [kept, {key: value for key, value in kept.items() if key != EVERY} | {RECOMPUTED: "selective"}]


def _optimizers(config: RunConfig) -> Iterator[Change]:
    """Moments and masters in less memory, of all roles that learn."""
    roles = ["policy_optimizer", *(["critic_optimizer"] if config.ppo.advantage == "gae" else [])]
    if all(getattr(config, role).kind == "adamw" for role in roles):
        keys: dict[str, object] = {f"{role}.kind": "adamw-8bit" for role in roles}
        needs = "torchao" if is_installed("torchao") else "pip install 'fastppo[torchao]'"
        yield Change(keys, f"moments in 8 bits ({needs})", 2)
    if config.policy.dtype == "bfloat16" and all(getattr(config, role).masters == "float32" for role in roles):
        keys = {f"{role}.masters": "stochastic" for role in roles}
        yield Change(keys, "weights are rounded at random, without float32 copies", 3)
    if config.memory.share == "none" and is_installed("peft"):  # which plans the adapters too
        yield Change({"memory.share": "lora"}, "adapters are trained, not the weights (peft)", 4)


def is_installed(package: str) -> bool:
    """Whether it can be imported; what cannot be planned without it is not tried."""
    return importlib.util.find_spec(package) is not None


def _offloads(config: RunConfig) -> Iterator[Change]:
    """They change no result; what moves is copied once per iteration, what is streamed once per micro-batch."""
    shares, kept = config.memory.share == "lora", {key for key in KEYS if getattr(config.offload, key) == "keep"}
    critic = config.ppo.advantage == "gae"
    frozen = {"reference"} if config.ppo.kl_coef > 0 and (not shares or config.policy.reference is not None) else set()
    frozen |= {"reward"} if has_full_reward(config) else set()
    trained = {"critic"} if critic and not shares else set()
    roles = ["policy_optimizer", *(["critic_optimizer"] if critic else [])]
    trained |= {role for role in roles if getattr(config, role).kind != "adamw-cpu-offload"}
    if frozen & kept:
        keys: dict[str, object] = {f"offload.{key}": "move" for key in sorted(frozen & kept)}
        yield Change(keys, "frozen models wait in host memory, the same results", 1)
    if critic and trained & kept:
        keys = {f"offload.{key}": "move" for key in sorted(trained & kept)}
        yield Change(keys, "critic and optimizers wait in host memory, the same results", 1)
    if streams := {key for key in frozen if getattr(config.offload, key) != "stream"}:
        keys = {f"offload.{key}": "stream" for key in sorted(streams)}
        yield Change(keys, "layers of frozen models come one by one, the same results", 2)


def _without_spare(
    config: RunConfig, keys: dict[str, object], portions: dict[str, object], plan: Plan
) -> tuple[dict[str, object], Plan]:
    """Without those of `[offload]` that it fits without, in the same portions; and the plan."""
    for key in [key for key in keys if key.startswith("offload.")]:
        fewer = {name: value for name, value in keys.items() if name != key}
        found = _tried(config, fewer | portions, plan)
        if found is not None and not found[0]:
            keys, plan = fewer, found[1]
    return keys, plan


def _combinations(changes: list[Change]) -> Iterator[tuple[Change, ...]]:
    """None of them, then some, by the sum of their prices."""
    some = [c for n in range(MOST_CHANGES + 1) for c in itertools.combinations(changes, n) if not _alternatives(c)]
    return iter(sorted(some, key=lambda c: sum(change.price for change in c)))


def _alternatives(changes: tuple[Change, ...]) -> bool:
    """Whether two of them are about one key."""
    return len({key for change in changes for key in change.keys}) < sum(len(change.keys) for change in changes)


def _tried(config: RunConfig, keys: dict[str, object], plan: Plan) -> tuple[dict[str, object], Plan] | None:
    """None too for changes that do not go together."""
    try:
        config = changed(config, keys)
    except InputError:
        return None
    return _fitted(config, plan)


def _same_changes(way: Way, keys: dict[str, object]) -> bool:
    """Whether a way found before does with some of these keys, beside its portions."""
    own = {k: v for k, v in way.keys.items() if k not in KEY_OF.values()}
    return own.items() <= keys.items()


def _fitted(config: RunConfig, plan: Plan) -> tuple[dict[str, object], Plan] | None:
    """The largest portions that fit, as keys where they are smaller than written, and the plan; None if none do."""
    work, budget = plan.setting.work, plan.budget
    evaluation = work.eval_sequences, work.eval_prompt
    setting = setting_of(config, plan.setting.device, prompt_tokens=work.prompt, evaluation=evaluation)
    setting = replace(setting, host_memory=plan.setting.host_memory, ranks=plan.setting.ranks)
    setting = _portions(setting, sequences=work.sequences, minibatch=work.minibatch)
    if floor(setting) > (budget or 0) or not can_fit(setting, budget):
        return None
    keys: dict[str, object] = {}
    setting = _portions(setting, max_rows=min(setting.work.max_rows, work.sampled.sequences))
    while not (made := make_plan(setting, budget)).fits:
        smaller = _smaller(made)
        if not smaller:
            return None
        setting = _portions(setting, **smaller)
        keys |= {KEY_OF[name]: size for name, size in smaller.items()}
    return keys, made


def _smaller(plan: Plan) -> dict[str, int]:
    """Half the rows or half the tokens, whichever may help; nothing where neither can."""
    work = plan.setting.work
    rows = {"max_rows": work.max_rows // 2} if work.max_rows > 1 else {}
    if rows and _phase(plan, "rollout") > _budget(plan):
        return rows
    half = min(work.max_tokens, work.sequences * work.longest) // 2
    cut = make_plan(least(plan.setting), plan.budget).fits
    if cut and work.max_tokens > work.longest:
        return {"max_tokens": max(half, work.longest)}
    return rows


def _phase(plan: Plan, name: str) -> int:
    return next(phase.total for phase in plan.phases if phase.name == name)


def _budget(plan: Plan) -> int:
    assert plan.budget is not None
    return plan.budget - plan.overhead
