"""Sweeps the launch shape of the row kernel: columns of a block, threads, stages of the pipeline, programs per SM.

    python bench/tune_rows.py --vocab 128256 --dtype bfloat16 [--rows 8192] [--out FILE]
    python bench/tune_rows.py --vocab 128256 --dtype float32 --gradient over own

Needs a CUDA GPU. A shape whose loss or gradient does not match float64 is not timed, nor one that does not compile; all
others run in turn, "fastppo" being the shape that the launcher takes by itself. The last line of the output is JSON.

What to expect of a shape depends on the second sweep: does it find the row in the L2 cache, which is the case while the
rows being worked on fit there, or not? `of copy` counts every logit read once and its gradient written once.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastppo.bench import arguments, harness
from fastppo.bench.harness import Case, Outputs, Variant
from fastppo.bench.problems import CLIP, LogitsProblem, logits_problem, logits_truth, pick_logits
from fastppo_kernels import gpu
from fastppo_kernels.gpu.launch import shared_memory_bytes
from fastppo_kernels.gpu.shapes import LaunchShape
from fastppo_kernels.reference import PPORows
from fastppo_kernels.settings import HeadSettings, PPOSettings
from fastppo_kernels.table import PPO_COLUMNS

LOSS = PPO_COLUMNS.index("loss")
THREADS_OF_A_MULTIPROCESSOR = 2048
GRADIENTS = {"place": "over the logits", "over": "bfloat16 over float32 logits", "own": "bfloat16, memory of its own"}


def shapes(vocab: int, element_size: int, shared_memory: int, options: argparse.Namespace) -> Iterator[LaunchShape]:
    """The shapes of the sweep that a multiprocessor can hold, with a block or more to a row."""
    lane = 16 // element_size
    for block, threads, stages, programs in itertools.product(
        options.blocks, options.threads_per_program, options.stages, options.programs
    ):
        buffers = (stages - 1) * block * element_size
        fits = threads * programs <= THREADS_OF_A_MULTIPROCESSOR and buffers * programs <= shared_memory
        if fits and lane * threads <= block <= vocab:
            yield LaunchShape(lane, threads, block // (lane * threads), 1, stages, programs)


def name_of(shape: LaunchShape) -> str:
    return f"{shape.block} x{shape.threads} s{shape.stages} p{shape.programs}"


def memory_of(p: LogitsProblem, gradient: str) -> Tensor:
    """(R, V) for the gradient."""
    if gradient == "over":
        return p.logits.view(torch.bfloat16)[:, : p.logits.shape[1]]
    return p.logits if gradient == "place" else torch.empty_like(p.logits, dtype=torch.bfloat16)


def run(p: LogitsProblem, dlogits: Tensor, shape: LaunchShape | None) -> Outputs:
    rows = PPORows(p.rows.old_logprobs, p.rows.advantages, p.rows.weights)
    s = PPOSettings(clip_low=CLIP, clip_high=CLIP, entropy_coef=p.rows.entropy_coef)
    options: dict[str, Any] = {"entropy": s.entropy_coef != 0, "dlogits": dlogits, "split": False, "shape": shape}
    table = gpu.ppo_rows(p.logits, p.rows.targets, rows, s, HeadSettings(), **options)
    return {"loss": table[:, LOSS].double().sum(), "dlogits": dlogits}


def case(options: argparse.Namespace, gradient: str, entropy: bool) -> Case:
    """The objective at one place of the gradient: a variant per shape, those that are wrong left out."""
    dtype = getattr(torch, options.dtype)
    p = logits_problem(options.rows, options.vocab, dtype, options.device, entropy)
    dlogits, size = memory_of(p, gradient), dtype.itemsize

    def of(shape: LaunchShape | None) -> Variant:
        return Variant(run=lambda: run(p, dlogits, shape), before=p.refill)

    found = shapes(options.vocab, size, shared_memory_bytes(p.logits), options)
    made = Case(
        op="rows",
        setting=dict(dtype=options.dtype, gradient=gradient, entropy=entropy, R=options.rows, V=options.vocab),
        variants={harness.OURS: of(None)},
        truth=logits_truth(p),
        tolerance=1e-5 if dlogits.dtype == torch.float32 else 1e-2,
        pick=pick_logits,
        num_bytes=options.rows * options.vocab * (size + dlogits.element_size()),
    )
    made.variants.update({name_of(shape): _checked(made, of(shape)) for shape in found})
    return made


def _checked(made: Case, variant: Variant) -> Variant | str:
    """The variant, or why it is not timed: the tolerance of the case, with nothing to spare."""
    try:
        harness.check(variant, made)
    except Exception as error:  # of the compiler, of the launch, or of the numbers
        return f"{type(error).__name__}: {str(error)[-160:]}"
    return variant


def parser() -> argparse.ArgumentParser:
    made = arguments.parser(__doc__, repeats=10)
    made.set_defaults(entropy=[False])
    made.add_argument("--vocab", type=int, default=128256)
    made.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the logits")
    made.add_argument("--rows", type=int, default=8192)
    places = "; ".join(f"{name}: {where}" for name, where in GRADIENTS.items())
    made.add_argument("--gradient", nargs="+", choices=GRADIENTS, help=places)
    made.add_argument("--blocks", type=int, nargs="+", default=[4096, 8192, 16384, 32768], help="powers of 2")
    made.add_argument("--threads-per-program", type=int, nargs="+", default=[128, 256, 512, 1024], help="powers of 2")
    made.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    made.add_argument("--programs", type=int, nargs="+", default=[1, 2, 4], help="per multiprocessor, by registers")
    return made


def summary(lines: list[dict[str, Any]]) -> str:
    """JSON: the setting, and the milliseconds of every shape, the fastest first."""
    ordered = sorted((line for line in lines if "skipped" not in line), key=lambda line: line["median_ms"])
    times = {line["variant"]: line["median_ms"] for line in ordered}
    return json.dumps({"op": ordered[0]["op"], **ordered[0]["setting"], "median_ms": times})


def main() -> None:
    """Sweep, print a table and a line of JSON for every place of the gradient."""
    options = arguments.start(parser())
    if not torch.cuda.is_available():
        raise SystemExit("tune_rows.py times the kernels on a CUDA GPU, and torch.cuda.is_available() is False here")
    places: list[str] = options.gradient or (["place"] if options.dtype == "bfloat16" else ["over", "own"])
    if options.dtype == "bfloat16" and places != ["place"]:
        raise SystemExit("bfloat16 logits take their gradient in place: --gradient over and own are for float32 ones")
    for gradient, entropy in [(place, entropy) for place in places for entropy in options.entropy]:
        print(summary(harness.measure(case(options, gradient, entropy), options)))


if __name__ == "__main__":
    main()
