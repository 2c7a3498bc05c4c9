"""Records: what was measured, one JSON object per line.

    {"suite": ..., "op": ..., "setting": {...}, "variant": ..., "median_ms": ..., "rounds_ms": [...], "machine": {...}}

A variant that was not timed has `skipped`, the reason, instead of numbers. The floor of a piece of work is the longer
of its least bytes at the machine's copy rate and its least operations at its matmul rate.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastppo.bench.machine import copy_rate, matmul_rate
from fastppo.checks import InputError

Record = dict[str, Any]
OURS = "fastppo"
YARDSTICK = "products_ms"  # field; "yardstick_ms" of older files is of another yardstick


@dataclass(frozen=True)
class Work:
    """The least that a piece of work must do."""

    num_bytes: float
    """Read and written."""
    flops: float = 0.0
    """Floating-point operations of the matrix products."""
    dtype: torch.dtype = torch.float32
    """Of the products' operands: which matmul rate to compare with."""
    tokens: float = 0.0
    """That it is counted in; 0: none."""

    def floor_seconds(self, device: str) -> tuple[float, str]:
        """What the machine would need, and what limits it: "copy" or "matmul"."""
        copy = self.num_bytes / copy_rate(device)
        matmul = self.flops / matmul_rate(device, self.dtype) if self.flops else 0.0
        return (copy, "copy") if copy >= matmul else (matmul, "matmul")


def numbers(seconds: Sequence[float], work: Work, device: str) -> Record:
    """Milliseconds over the rounds, and what they make of the work."""
    median = statistics.median(seconds)
    fifths = statistics.quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else [median]
    floor, limit = work.floor_seconds(device)
    made: Record = {
        "median_ms": 1e3 * median,
        "p20_ms": 1e3 * fifths[0],
        "p80_ms": 1e3 * fifths[-1],
        "min_ms": 1e3 * min(seconds),
        "rounds_ms": [short(1e3 * x) for x in seconds],
        "least_bytes": work.num_bytes,
        "gb_per_s": work.num_bytes / median / 1e9,
        "floor_ms": 1e3 * floor,
        "of_floor": floor / median,
        "limit": limit,
    }
    if work.flops:
        rate = work.flops / median
        made |= {"least_flops": work.flops, "gflop_per_s": rate / 1e9, "mfu": rate / matmul_rate(device, work.dtype)}
    if work.tokens:
        made["tokens_per_s"] = work.tokens / median
    return shortened(made)


def shortened(record: Record) -> Record:
    """Four digits, and no NaN, which JSON has not."""
    return {name: short(x) for name, x in record.items() if x == x}


def short(x: Any) -> Any:
    return float(f"{x:.4g}") if isinstance(x, float) else x


def append(path: Path | None, records: Iterable[Record]) -> None:
    """Add lines to a file; nothing without one."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


def read(path: Path) -> list[Record]:
    """All records of a file.

    Raises:
        ValueError: it cannot be read, or a line is no record.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read the measurements at {str(path)!r}: {error.strerror}") from error
    found = []
    for place, line in enumerate(text.splitlines(), start=1):
        try:
            record = json.loads(line)
            found.append({**record, "op": record["op"], "setting": record["setting"], "variant": record["variant"]})
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{path}, line {place} is no measurement of `fastppo bench` (needs JSON with op, setting, variant)"
            ) from error
    return found


def setting_text(setting: dict[str, Any]) -> str:
    """ "dtype=float32 R=1024"."""
    return " ".join(f"{name}={value}" for name, value in setting.items())


def cell(record: Record, name: str, form: str) -> str:
    """A number of a record, or a dash."""
    value = record.get(name)
    return "-" if value is None or (isinstance(value, float) and math.isnan(value)) else format(value, form)


COLUMNS = (  # name in the record, heading, format
    ("median_ms", "median ms", ".4g"),
    ("p20_ms", "p20", ".4g"),
    ("p80_ms", "p80", ".4g"),
    ("cpu_ms", "CPU ms", ".4g"),
    ("times_fastppo", "x fastppo", ".2f"),
    ("of_floor", "of floor", ".1%"),
    ("mfu", "MFU", ".1%"),
    ("graph_ms", "graph ms", ".4g"),
    ("tokens_per_s", "tokens/s", ".4g"),
    ("peak_extra_mb", "extra MB", ".1f"),
    ("peak_mb", "peak MB", ".0f"),
    ("times_fixed", "x fixed", ".3f"),
    ("error", "error", ".1e"),
)


def show(title: str, records: Sequence[Record], label: str = "variant") -> None:
    """Print records that share a setting, a line each; those that were not timed say why."""
    timed = [r for r in records if "skipped" not in r]
    columns = [c for c in COLUMNS if any(c[0] in r for r in timed)]
    width = max([len(str(r[label])) for r in records] + [12]) + 2
    print(f"\n{title}")
    if timed:
        print("  " + "".ljust(width) + "".join(f"{heading:>11}" for _, heading, _ in columns))
    for r in timed:
        cells = "".join(f"{cell(r, name, form):>11}" for name, _, form in columns)
        print(f"  {r[label]:{width}}{cells}  {r.get('note', '')}".rstrip())
    for r in records:
        if "skipped" in r:
            print(f"  {r[label]:{width}}not timed: {r['skipped']}")
