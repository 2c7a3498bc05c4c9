"""Who is on the device when: what stays there, and what `[offload]` brings for a phase or for a part of one."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastppo.memory import passes
from fastppo.memory.ledger import Parts, dry_run
from fastppo.memory.passes import MASTERS, Model
from fastppo.offload.layers import streamed_bytes

if TYPE_CHECKING:
    from fastppo.memory.plan import Setting

MOMENTS = "optimizer moments"


@dataclass(frozen=True)
class Holding:
    """What is sent away and brought back as one."""

    name: str
    way: str
    whole: Parts
    at_work: Parts
    """On the device while it is used: less than the whole where layers are streamed."""
    model: Model

    @property
    def optimizer(self) -> bool:
        """Whether it is masters and moments, not weights."""
        return self.name.endswith("_optimizer")


def on_device(setting: "Setting", *used: str) -> Parts:
    """What is on the device while `used` are, and nothing else that moves."""
    there = (x.at_work for x in holdings(setting) if x.way == "keep" or x.name in used)
    return sum(there, Parts())


def loading(setting: "Setting") -> Parts:
    """The most at a time while roles are made: on the device, from which each goes before the next one's masters are
    made. Reward models that move are never there, and no moments are made yet."""
    stays = {x.name for x in holdings(setting) if x.way == "keep"}
    steps = [{"critic", "reference"}, {"critic", "critic_optimizer"}, {"policy_optimizer"}]
    made = [[x.whole for x in holdings(setting) if x.name in step | stays] for step in steps]
    most = max((sum(parts, Parts()) for parts in made), key=lambda parts: (parts - moments(parts)).total())
    return most - moments(most)


def moments(parts: Parts) -> Parts:
    """Those of the optimizers among them."""
    return Parts({MOMENTS: parts[MOMENTS]})


def holdings(setting: "Setting") -> Iterator[Holding]:
    """Of every role its weights, and its masters with its moments."""
    named = [("policy", setting.policy), ("critic", setting.critic), ("reference", setting.reference)]
    named += [(reward(i), model) for i, (model, _) in enumerate(setting.rewards)]
    for name, model in [(name, model) for name, model in named if model is not None]:
        label, size = f"{name.partition(' ')[0]} weights", passes.sizes(model)
        on_base = model.adapted and name != "policy"  # whose weights are counted there, and stay
        way = "keep" if on_base else getattr(setting.offload, name.partition(" ")[0], "keep")
        whole = size.trained if on_base else size.weights
        at_work = _streamed(model) if way == "stream" else whole
        yield Holding(name, way, Parts({label: whole}), Parts({label: at_work}), model)
    for name, model in (("policy", setting.policy), ("critic", setting.critic)):
        if model is not None:
            size, key = passes.sizes(model), f"{name}_optimizer"
            kept = +Parts({MASTERS: size.masters, MOMENTS: size.moments})
            yield Holding(key, getattr(setting.offload, key), kept, kept, model)


def reward(place: int) -> str:
    """The name of the reward model at that place."""
    return f"reward {place}"


@functools.cache
def _streamed(model: Model) -> int:
    with dry_run() as ledger:
        return streamed_bytes(model.outline(ledger))
