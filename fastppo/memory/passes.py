"""Dry runs of what a phase does with one model: the real forward and backward, on tensors that have no memory."""

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastppo import attention, models
from fastppo.config import LayersConfig, MemoryConfig, OptimizerConfig
from fastppo.masters import make_weight
from fastppo.memory import depth as depths
from fastppo.memory.attention import OUTLINE, UNGROUPED, elsewhere
from fastppo.memory.depth import History
from fastppo.memory.head import head_bytes, policy_loss, value_loss
from fastppo.memory.ledger import Ledger, Parts, dry_run
from fastppo.memory.load import Load, positions_of
from fastppo.memory.sizes import Sizes, moment_bytes
from fastppo.microbatch import MicroBatch
from fastppo.models.outline import Kind
from fastppo.rollout.kv import Decode, KVRows, Prefill

WEIGHTS, MASTERS, GRADIENTS, KV = "weights", "float32 masters", "gradients", "KV cache"
ACTIVATIONS, BACKWARD, LOGITS = "activations", "backward of a layer", "logits"
ROUNDING = 16  # bytes per number: the master made for the step, noise, their sum, and the rounded result
PLAIN, AVERAGE = LayersConfig(), OptimizerConfig()
P = ParamSpec("P")
T = TypeVar("T")
NAMES = ("_name_or_path", "transformers_version", "architectures")  # of a config, and nothing of its shape


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a role's memory depends on."""

    config: PreTrainedConfig = field(compare=False, repr=False)
    shape: str = field(init=False, repr=False)  # what the config says: two of equal shape are equal
    kind: Kind
    dtype: str
    device: torch.device
    layers: LayersConfig = PLAIN
    optimizer: OptimizerConfig = OptimizerConfig()
    memory: MemoryConfig = MemoryConfig()
    """With share = "lora": adapters are trained, on a base that all roles share."""

    def __post_init__(self) -> None:
        said = {key: value for key, value in self.config.to_dict().items() if key not in NAMES}
        object.__setattr__(self, "shape", json.dumps(said, sort_keys=True, default=str))

    def run(self, dry: Callable[["Model"], History]) -> History:
        """A dry run, of few layers where the others are like them."""
        every = self.layers.checkpoint_every if self.layers.checkpointing != "none" else 1
        period, depth = math.lcm(sizes(self).period, every), depths.depth_of(self.config)

        def of_layers(number: int | None) -> History:
            return dry(self if number is None else replace(self, config=depths.cut(self.config, number)))

        return depths.extrapolated(of_layers, depth, period)

    def outline(self, ledger: Ledger) -> PreTrainedModel:
        """The model, its weights in the ledger."""
        on_cpu, kept_here = self.device.type == "cpu", replace(self.layers, offload_activations=False)
        with ledger.labelled(WEIGHTS):
            model = models.outline(self.config, self.kind, self.dtype, layers=kept_here, on_cpu=on_cpu)
            if self.adapted:
                model = _adapted(model, self.memory)
        softcap = getattr(self.config.get_text_config(), "attn_logit_softcapping", None)
        if attention.backend(self.device, getattr(torch, self.dtype), softcap) != "sdpa":
            model.set_attn_implementation(OUTLINE)
        elif self.device.type == "cuda":
            model.set_attn_implementation(UNGROUPED)
        if self.layers.offload_activations:
            elsewhere(model)
        ledger.peak.clear()  # weights that are tied in the end are made apart
        ledger.note()
        return model

    @property
    def adapted(self) -> bool:
        """Whether it learns by adapters."""
        return self.memory.share == "lora"


def _adapted(model: PreTrainedModel, memory: MemoryConfig) -> PreTrainedModel:
    """With adapters on the layers of the body, which are those a policy has; a value head learns too."""
    layers = (name for name, x in model.base_model.named_modules() if isinstance(x, nn.Linear | Conv1D))
    if memory.lora_targets == ("all-linear",):
        memory = replace(memory, lora_targets=tuple(sorted({name.rpartition(".")[2] for name in layers})))
    model = models.adapt(model, memory)
    if model.get_output_embeddings() is None:
        models.value_head(model).requires_grad_(True)
    return model


def _without_gradient(function: Callable[Concatenate[Model, P], T]) -> Callable[Concatenate[Model, P], T]:
    """Remembered by all but what layers keep for a backward pass and what optimizers keep."""
    remembered = functools.cache(function)

    @functools.wraps(function)
    def call(model: Model, *args: P.args, **kwargs: P.kwargs) -> T:
        model = replace(model, layers=PLAIN, optimizer=AVERAGE)
        return remembered(model, *args, **kwargs)  # pyright: ignore[reportArgumentType]  all are hashable

    return call


def sizes(model: Model) -> Sizes:
    """What the weights take, and what their optimizer keeps of them."""
    return _sizes(replace(model, layers=PLAIN))


@functools.cache
def _sizes(model: Model) -> Sizes:
    kind, rounds = model.optimizer.kind, model.optimizer.masters == "stochastic"
    with dry_run() as ledger:
        made = model.outline(ledger)
        learning = [p for p in made.parameters() if p.requires_grad]
        mixed = [p.numel() for p in learning if p.dtype != torch.float32]
        on_device = 0 if kind == "adamw-cpu-offload" else 1
        return Sizes(
            weights=ledger.live.total(),
            trained=sum(p.numel() * p.element_size() for p in learning),
            gradients=4 * sum(p.numel() for p in learning),
            masters=0 if rounds else 4 * sum(mixed) * on_device,
            moments=sum(moment_bytes(p.numel(), kind) for p in learning) * on_device,
            step=ROUNDING * max(mixed, default=0) if rounds else 0,
            period=depths.period_of(made),
        )


def gradient(model: Model, load: Load, *, accumulates: bool) -> Parts:
    """The peak of one micro-batch's forward and backward, weights and masters included.

    `accumulates`: it is not the first one of its minibatch, so that gradients are there before it.
    """
    where = "adamw-cpu-offload" if model.optimizer.kind == "adamw-cpu-offload" else "adamw"
    optimizer = OptimizerConfig(kind=where, masters=model.optimizer.masters)  # nothing else of it matters here
    return _gradient(replace(model, optimizer=optimizer), load, accumulates)


@functools.cache
def _gradient(model: Model, load: Load, accumulates: bool) -> Parts:
    batch = load.batch(model.device)

    def dry(model: Model) -> History:
        with dry_run() as ledger:
            made = model.outline(ledger)
            ledger.begin()
            _follow_gradients(made, model, ledger, there=accumulates)
            with ledger.labelled(ACTIVATIONS):
                ledger.begin()
                loss = _loss(made, model, batch, ledger)
            with ledger.labelled(BACKWARD):
                ledger.begin()
                loss.backward()
        return ledger.history

    return depths.peak([parts for section in model.run(dry) for parts in section])


@_without_gradient
def forward(model: Model, load: Load) -> Parts:
    """The peak of scoring a micro-batch: log-probs, values or rewards; weights included."""
    batch = load.batch(model.device)

    def dry(model: Model) -> History:
        with dry_run() as ledger, torch.no_grad(), ledger.labelled(ACTIVATIONS):
            made = model.outline(ledger)
            ledger.begin()
            if model.kind == "reward" and not models.is_decoder(made):
                made(input_ids=torch.zeros(len(load.lengths), max(load.lengths), dtype=torch.int64))
            else:
                hidden = models.hidden_states(made, batch)
                if model.kind == "policy":
                    hidden, head = hidden[batch.rows], models.lm_head(made)
                    ledger.note("LM head", head_bytes(hidden, head.weight, model.device, train=False))
                else:
                    models.classify(made, hidden)
        return ledger.history

    return depths.peak(model.run(dry)[0])


@dataclass(frozen=True)
class Sampled:
    """Bytes of a rollout."""

    peak: Parts
    step: int
    """Most that one step over all rows makes and drops."""


@_without_gradient
def sampling(model: Model, rows: int, prompt: int, response: int, *, span: int, prefill: int) -> Sampled:
    """The peak of a rollout of `rows` sequences at a time: keys and values, reading prompts, decoding a token.

    Args:
        span: positions of a row are a multiple of it.
        prefill: prompt tokens of one forward, unless one prompt is longer.
    """
    positions = -(-(prompt + response) // span) * span
    together, tail = divmod(min(rows * prompt, max(prefill, prompt)), prompt)
    lengths = [prompt] * together + [tail] * (tail > 0)
    packing, cells = attention.plan(lengths, recurring=True, runs_on=model.device.type), positions_of(lengths)
    padded = attention.padded(cells, packing)
    which = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))

    def dry(model: Model) -> History:
        with dry_run() as ledger, torch.no_grad(), ledger.labelled(ACTIVATIONS):
            made = model.outline(ledger)
            ledger.begin()
            kv = _kv(made, rows, positions, ledger)
            ledger.begin()
            ids = torch.zeros(len(padded), dtype=torch.int64)
            hidden = _body(made, ids, padded, memory=Prefill(kv, which, cells), packing=packing)
            _sample(made, hidden[torch.arange(len(lengths))], ledger)
            del hidden
            ledger.begin()
            ids, at = torch.zeros(rows, dtype=torch.int64), torch.full((rows,), positions - 1)
            hidden = _body(made, ids, at, memory=Decode(kv, at, positions), packing=None)
            _sample(made, hidden, ledger)
        return ledger.history

    made, reading, decoding = model.run(dry)
    most = depths.peak(decoding)
    return Sampled(depths.peak([*made, *reading, *decoding]), most.total() - decoding[0].total())


@functools.cache
def packs(model: Model) -> bool:
    """Whether it reads samples packed; else they are padded, however many tokens that makes."""
    with dry_run() as ledger:
        return models.is_decoder(model.outline(ledger))


@_without_gradient
def kv_row_bytes(model: Model, positions: int) -> int:
    """Bytes of the keys and values of one sequence."""
    with dry_run() as ledger:
        return positions * models.kv_bytes_per_token(model.outline(ledger))


def _loss(made: PreTrainedModel, model: Model, batch: MicroBatch, ledger: Ledger) -> Tensor:
    hidden = models.hidden_states(made, batch)[batch.rows]
    if model.kind == "critic":
        return value_loss(hidden, models.value_head(made).weight[0], ledger)
    return policy_loss(hidden, models.lm_head(made).weight, ledger, model.device)


def _follow_gradients(made: PreTrainedModel, model: Model, ledger: Ledger, *, there: bool) -> None:
    """Masters where there are some, and every gradient called so as soon as it is `there`, or from the beginning."""
    for p in [p for p in made.parameters() if p.requires_grad]:
        with ledger.labelled(MASTERS):
            holder = make_weight(p, model.optimizer).gradient
        if there:
            with ledger.labelled(GRADIENTS):
                holder.grad = torch.empty(p.shape, dtype=torch.float32)
        p.register_post_accumulate_grad_hook(_tagged(holder, ledger))


def _tagged(master: Tensor, ledger: Ledger) -> Callable[[Tensor], None]:
    def tag(_: Tensor) -> None:
        if master.grad is not None:
            ledger.tag(master.grad, GRADIENTS)

    return tag


def _body(made: PreTrainedModel, ids: Tensor, positions: Tensor, **attends: object) -> Tensor:
    out = made.base_model(input_ids=ids[None], position_ids=positions[None], use_cache=False, **attends)
    return out.last_hidden_state[0]


def _sample(made: PreTrainedModel, hidden: Tensor, ledger: Ledger) -> None:
    """Logits; a soft-cap is put on them where they are."""
    head = models.lm_head(made)
    with ledger.labelled(LOGITS):
        logits = torch.nn.functional.linear(hidden, head.weight, head.bias)
    del logits


def _kv(made: PreTrainedModel, rows: int, positions: int, ledger: Ledger) -> KVRows:
    layers, heads, size = models.kv_shape(made)
    with ledger.labelled(KV):
        memory = {i: [torch.zeros(rows, heads, positions, size, dtype=made.dtype) for _ in "kv"] for i in range(layers)}
    return KVRows(rows, positions, {i: (k, v) for i, (k, v) in memory.items()})
