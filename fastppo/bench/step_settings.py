"""What the step benchmark is run with: models, lengths, sweeps, and the options that name them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import get_args

import torch

from fastppo.bench import arguments
from fastppo.bench.lengths import LENGTHS
from fastppo.bench.shapes import SHAPES, config_of, num_parameters
from fastppo.config_inputs import Dtype

TRAINING = ("full", "lora")
SWEEPS = ("tokens", "vocabulary", "skew", "batch")


@dataclass(frozen=True)
class Setting:
    """What an iteration is made of; lengths are means."""

    shape: str
    dtype: Dtype
    training: str
    lengths: str
    prompts: int
    prompt_tokens: int
    response_tokens: int
    epochs: int
    minibatches: int
    max_tokens: int
    vocab_size: int

    @property
    def model(self) -> tuple[str, str, str, int]:
        """Settings that agree in this share a model."""
        return self.shape, self.dtype, self.training, self.vocab_size


def settings(options: argparse.Namespace) -> list[Setting]:
    """Those of the command line, the ones that share a model next to each other."""
    made = [
        Setting(
            shape=shape,
            dtype=dtype,
            training=training,
            lengths=kind,
            prompts=options.prompts,
            prompt_tokens=options.prompt_tokens,
            response_tokens=options.response_tokens,
            epochs=options.epochs,
            minibatches=options.minibatches,
            max_tokens=options.max_tokens,
            vocab_size=options.vocab_size or config_of(shape).vocab_size,
        )
        for shape in options.shape
        for dtype in options.dtype
        for training in options.training
        for kind in options.lengths
    ]
    return [changed for setting in made for changed in swept(setting, options.sweep)]


def swept(s: Setting, sweep: str | None) -> list[Setting]:
    """The settings of a sweep around one."""
    if sweep == "tokens":
        return [replace(s, response_tokens=max(1, int(s.response_tokens * x))) for x in (0.5, 1, 2, 4)]
    if sweep == "vocabulary":
        return [replace(s, vocab_size=v) for v in (4096, 16384, 32000, 151936)]
    if sweep == "skew":
        return [replace(s, lengths=kind) for kind in LENGTHS]
    if sweep == "batch":
        return [replace(s, prompts=s.prompts * x) for x in (1, 2, 4)]
    return [s]


def parser(doc: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="fastppo bench step", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_common(made)
    gpu = torch.cuda.is_available()
    by_size = sorted(SHAPES, key=lambda s: num_parameters(config_of(s)))  # what a time limit cuts off is the largest
    shapes = [s for s in by_size if s != "tiny"] if gpu else ["tiny"]
    made.add_argument("--shape", nargs="+", choices=SHAPES, default=shapes)
    made.add_argument("--dtype", nargs="+", choices=get_args(Dtype), default=["bfloat16" if gpu else "float32"])
    made.add_argument("--training", nargs="+", choices=TRAINING, default=list(TRAINING))
    made.add_argument("--lengths", nargs="+", choices=LENGTHS, default=["fixed"])
    made.add_argument("--sweep", choices=SWEEPS, help="a row for each of several numbers of this")
    made.add_argument("--prompts", type=int, default=64)
    made.add_argument("--prompt-tokens", type=int, default=256 if gpu else 16, help="mean length")
    made.add_argument("--response-tokens", type=int, default=512 if gpu else 48, help="mean length")
    made.add_argument("--epochs", type=int, default=1 if gpu else 2)
    made.add_argument("--minibatches", type=int, default=4)
    made.add_argument("--max-tokens", type=int, default=8192 if gpu else 2048, help="per micro-batch")
    made.add_argument("--vocab-size", type=int, help="instead of the shape's")
    made.add_argument("--rounds", type=int, default=9)
    return made
