"""The peak of each phase of a run, by component, before anything is loaded."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from fastppo.config_offload import OffloadConfig
from fastppo.memory import host, passes
from fastppo.memory.ledger import Parts
from fastppo.memory.load import Load
from fastppo.memory.passes import GRADIENTS, KV, MASTERS, WEIGHTS, Model
from fastppo.memory.presence import loading, moments, on_device, reward
from fastppo.rollout.decoder import PREFILL_TOKENS, SPAN

GIB = 1 << 30
REWARD_TOKENS = 1 << 14  # of samples that a reward model reads at a time
CONTEXT = {"cuda": GIB, "cpu": int(0.6 * GIB)}  # CUDA's context and cuBLAS's workspace; Python and its libraries
SLACK = {"cuda": 0.05, "cpu": 0.0}  # of what comes and goes: blocks of the caching allocator that fit nothing
ASLEEP = GIB  # of a card, by a vLLM server that sleeps: its context
SERVERS = "vLLM servers"


@dataclass(frozen=True)
class Work:
    """The data of one iteration, of one rank. Every prompt is taken to be as long as the longest."""

    sequences: int
    minibatch: int
    """Sequences of an optimizer step."""
    prompt: int
    response: int
    max_tokens: int
    """Of a micro-batch."""
    max_rows: int
    kv_bytes: int | None
    eval_sequences: int = 0
    """Of an evaluation, a response each."""
    eval_prompt: int = 0
    """Tokens of its longest prompt."""
    embedded: bool = True
    """Sampled in this process."""
    keeps_kv: bool = False
    """The sampler's memory lives on between rollouts."""
    graphs: bool = False
    """Its steps are recorded."""
    servers: float = 0.0
    """Portion of the device that vLLM servers on it take."""
    servers_sleep: bool = False
    """Between rollouts."""

    @property
    def longest(self) -> int:
        """Tokens of a sequence."""
        return self.prompt + self.response

    @property
    def sampled(self) -> "Work":
        """With the sequences of an evaluation, where those are more or longer: what samples and what scores meets."""
        sequences, prompt = max(self.sequences, self.eval_sequences), max(self.prompt, self.eval_prompt)
        return replace(self, sequences=sequences, prompt=prompt)

    def micro(self, sequences: int) -> tuple[Load, bool]:
        """The largest micro-batch of some sequences, and whether there are others.

        Where it is full, shorter sequences than the longest fill it to the last token.
        """
        tokens = min(sequences * self.longest, max(self.max_tokens, self.longest))
        whole, tail = divmod(tokens, self.longest)
        return Load(whole, self.prompt, self.response, tail), tokens < sequences * self.longest


@dataclass(frozen=True)
class Setting:
    """What a plan is made from: the models by role and the work."""

    policy: Model
    critic: Model | None
    reference: Model | None
    rewards: tuple[tuple[Model, int], ...]
    """Reward models, and how many sequences each reads at a time."""
    work: Work
    roll_back: bool = False
    offload: OffloadConfig = OffloadConfig()
    copies_to_save: bool = False
    """A checkpoint is written from a copy, while training goes on."""
    host_memory: int | None = None
    """Bytes of this machine, where the device is a GPU of it."""
    ranks: int = 1
    """Processes that share that."""

    @property
    def device(self) -> torch.device:
        return self.policy.device


@dataclass(frozen=True)
class Phase:
    """What a phase holds when it holds the most."""

    name: str
    parts: Parts

    @property
    def total(self) -> int:
        """Bytes."""
        return self.parts.total()

    @property
    def own(self) -> int:
        """Those of this process."""
        return self.total - self.parts[SERVERS]


@dataclass(frozen=True)
class Plan:
    """All phases, for a budget."""

    setting: Setting
    phases: tuple[Phase, ...]
    budget: int | None
    """Bytes of the device."""
    lasting: int = 0
    """Bytes that are there from loading on, whatever moves."""
    in_host_memory: int = 0
    """Bytes of what moves, which waits there, and of optimizers that are there."""
    checkpoint_copy: int = 0
    """Bytes in host memory, of the first rank."""

    @property
    def peak(self) -> Phase:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def overhead(self) -> int:
        """Beside the tensors: the process, and what the allocator cannot use."""
        device = self.setting.device.type
        return CONTEXT[device] + int(SLACK[device] * max(0, self.peak.own - self.lasting))

    @property
    def needed(self) -> int:
        """Bytes that the device must have."""
        return self.peak.total + self.overhead

    @property
    def host_needed(self) -> int:
        """Bytes that the machine must have beside the GPU's."""
        return self.in_host_memory * self.setting.ranks + self.checkpoint_copy

    @property
    def fits_host(self) -> bool:
        return self.setting.host_memory is None or self.host_needed <= self.setting.host_memory

    @property
    def fits(self) -> bool:
        return self.fits_host and (self.budget is None or self.needed <= self.budget)


def make_plan(setting: Setting, budget: int | None = None) -> Plan:
    """Dry runs of every phase; all but `load` are of a later iteration, when the optimizers have their moments."""
    here = functools.partial(on_device, setting)
    on_cpu = host.checkpoint_copy(setting) if setting.device.type == "cpu" else 0  # which is host memory
    saved = Parts({"checkpoint copy": on_cpu})  # in the next rollout too: it is written beside training
    sampler, kept = _rollout(setting, here().total(), budget)
    awake, between = _servers(setting.work, budget)
    made = [Phase("load", loading(setting) + awake), Phase("rollout", here() + sampler + awake + saved)]
    later = kept + between + saved
    if setting.rewards:
        rewards = [here(reward(i)) + _reward(*r, setting.work.sampled) for i, r in enumerate(setting.rewards)]
        made.append(Phase("reward", _largest(rewards) + later))
    made.append(Phase("score", _largest(list(_scoring(setting))) + _batch(setting) + later))
    made.append(Phase("update", _largest(list(_updating(setting))) + _batch(setting) + later))
    lasting, waits = (here() - moments(here())).total(), host.in_host_memory(setting)
    return Plan(setting, tuple(made), budget, lasting, waits, host.checkpoint_copy(setting))


def floor(setting: Setting) -> int:
    """Bytes that the device must have whatever the portions are, from sizes alone: for each optimizer's step."""
    here, critic = functools.partial(on_device, setting), setting.critic
    steps = [here("policy_optimizer") + _step(setting.policy)]
    steps += [here("critic", "critic_optimizer") + _step(critic)] if critic is not None else []
    return _largest(steps).total() + CONTEXT[setting.device.type]


def _scoring(setting: Setting) -> Iterator[Parts]:
    """One model after the other; what moves comes while the one before it is at work."""
    here, critic = functools.partial(on_device, setting), setting.critic
    yield here("reference") + _forward(setting.policy, setting.work)
    if setting.reference is not None:
        yield here("reference", "critic") + _forward(setting.reference, setting.work)
    if critic is not None:
        yield here("critic") + _forward(critic, setting.work)


def _updating(setting: Setting) -> Iterator[Parts]:
    """One role after the other."""
    here = functools.partial(on_device, setting)
    if setting.critic is not None:
        yield here("critic", "critic_optimizer") + _gradient(setting.critic, setting)
    yield here("policy_optimizer") + _gradient(setting.policy, setting) + _snapshot(setting)


def _gradient(model: Model, setting: Setting) -> Parts:
    load, more = setting.work.micro(setting.work.minibatch)
    backward = _beyond(passes.gradient(model, load, accumulates=more))
    return _largest([backward, _step(model)])


def _step(model: Model) -> Parts:
    """When the micro-batches are through."""
    gradients = passes.sizes(model).gradients
    return Parts({GRADIENTS: gradients, "optimizer step": passes.sizes(model).step})


def _forward(model: Model, work: Work) -> Parts:
    return _beyond(passes.forward(model, work.micro(work.sequences)[0]))


def _reward(model: Model, batch_size: int, work: Work) -> Parts:
    sequences = min(work.sequences, batch_size)
    most = REWARD_TOKENS if passes.packs(model) else sequences * work.longest
    return _forward(model, replace(work, sequences=sequences, max_tokens=most))


def _rollout(setting: Setting, lasting: int, budget: int | None) -> tuple[Parts, Parts]:
    """While it runs, and what of it lives on until the next one."""
    work = setting.work.sampled
    if not work.embedded:
        return Parts(), Parts()
    rows = min(work.max_rows, work.sequences, _rows_that_fit(setting, work, lasting, budget))
    run = passes.sampling(setting.policy, rows, work.prompt, work.response, span=SPAN, prefill=PREFILL_TOKENS)
    requests = Parts({"requests": work.sequences * work.response * (4 + 8 + 4)})  # uniforms, tokens, log-probs
    # Steps of all numbers of rows are recorded into one pool, which is taken to be as large as the largest needs:
    pool = Parts({"CUDA graphs": run.step * (work.graphs and setting.device.type == "cuda")})
    kept = Parts({KV: run.peak[KV]}) + requests + pool if work.keeps_kv else Parts()
    return _beyond(run.peak) + requests + pool, kept


def _servers(work: Work, budget: int | None) -> tuple[Parts, Parts]:
    """What vLLM takes of this device, awake, as it starts and samples, and between rollouts."""
    awake = int(work.servers * (budget or 0))
    return Parts({SERVERS: awake}), Parts({SERVERS: min(awake, ASLEEP) if work.servers_sleep else awake})


def _rows_that_fit(setting: Setting, work: Work, lasting: int, budget: int | None) -> int:
    """As the embedded engine does: what `kv_gib` says, on a GPU half of what is free, on a CPU all."""
    space = work.kv_bytes
    if space is None and setting.device.type == "cuda" and budget is not None:
        space = max(0, budget - CONTEXT["cuda"] - lasting) // 2
    if space is None:
        return work.max_rows
    row = passes.kv_row_bytes(setting.policy, -(-work.longest // SPAN) * SPAN)
    return max(1, space // row)


def _batch(setting: Setting) -> Parts:
    """The rollout, the experience, and the indices of a micro-batch."""
    work = setting.work
    tokens, actions = work.sequences * work.longest, work.sequences * work.response
    indices = 9 * 8 * work.micro(work.minibatch)[0].tokens
    return Parts({"batch": tokens * (8 + 1 + 8) + actions * (8 + 9 * 4) + indices})


def _snapshot(setting: Setting) -> Parts:
    return Parts({"roll-back copy": host.roll_back_copy(setting)[0]})


def _beyond(run: Parts) -> Parts:
    """A dry run without what is resident."""
    return Parts({name: size for name, size in run.items() if name not in (WEIGHTS, MASTERS)})


def _largest(some: Sequence[Parts]) -> Parts:
    key: Callable[[Parts], int] = lambda parts: parts.total()  # noqa: E731
    return max(some, key=key)
