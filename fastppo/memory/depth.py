"""Dry runs of deep models from two of few layers: each further layer adds the same bytes to what a moment holds.

Layers that are alike leave alike things behind, so in a model of L layers the bytes of a moment are linear in the place
of its layer, and most of them in the first layers or in the last. Those moments are found in two models of few layers,
one a layer deeper than the other, as the ones with the same distance from the beginning or from the end; what the
deeper one holds more is what every further layer adds.
"""

import copy
from collections.abc import Callable, Iterator

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fastppo.memory.ledger import Parts

History = list[list[Parts]]
"""What lived at each moment, of each section."""


def extrapolated(run: Callable[[int | None], History], depth: int, period: int) -> History:
    """What `run(None)`, of the whole model, gives, or moments of it among which those are that hold the most.

    Args:
        run: dry runs with so many layers.
        period: after how many layers they repeat; 0: not known.
    """
    periods = 4 if period == 1 else 3  # the first layer and the last may differ, by what is alive beside them
    few = depth % max(period, 1) + periods * period
    if not period or few + period >= depth:
        return run(None)
    pairs = list(zip(run(few), run(few + period), strict=True))
    each = [len(longer) - len(short) for short, longer in pairs]
    if any(n and len(short) > (periods + 1) * n for n, (short, _) in zip(each, pairs, strict=True)):
        return run(None)  # more than a layer of it is before or after the layers
    times = (depth - few) // period
    return [list(_moments(a, b, (periods - 1) * n or len(a), times)) for n, (a, b) in zip(each, pairs, strict=True)]


def _moments(short: list[Parts], longer: list[Parts], known: int, times: int) -> Iterator[Parts]:
    """Of one section, in their order: so many from the beginning, then as many up to the end."""
    yield from (_further(a, b, times) for a, b in zip(short[:known], longer[:known], strict=True))
    yield from (_further(a, b, times) for a, b in zip(short[-known:], longer[-known:], strict=True))


def _further(short: Parts, longer: Parts, times: int) -> Parts:
    sizes = {name: longer[name] + (times - 1) * (longer[name] - short[name]) for name in longer | short}
    return Parts({name: size for name, size in sizes.items() if size})


def peak(section: list[Parts]) -> Parts:
    """The first moment that holds the most."""
    return max(section, key=lambda parts: parts.total())


def depth_of(config: PreTrainedConfig) -> int:
    """Layers of a model; 0: its config does not say."""
    return getattr(config.get_text_config(), "num_hidden_layers", 0)


def cut(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same with fewer layers, the first ones."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    text.num_hidden_layers = layers
    return config


def period_of(model: PreTrainedModel) -> int:
    """After how many layers the layers of a model repeat, as far as their weights and kinds tell; 0: they do not."""
    text, depth = model.config.get_text_config(), depth_of(model.config)
    lists = {key for key, x in vars(text).items() if isinstance(x, list | tuple) and len(x) == depth}
    stacks = [x for x in model.modules() if isinstance(x, nn.ModuleList) and len(x) == depth]
    if not depth or len(stacks) != 1 or lists - {"layer_types"}:
        return 0
    kinds = getattr(text, "layer_types", None) or [""] * depth
    said = [
        (type(layer), kind, [(name, p.shape, p.requires_grad) for name, p in layer.named_parameters()])
        for layer, kind in zip(stacks[0], kinds, strict=True)
    ]
    return next((p for p in range(1, depth) if said[p:] == said[:-p]), 0)
