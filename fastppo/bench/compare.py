"""What moved between two files of records, beyond their noise.

A measurement is compared in units of the yardstick that was timed beside it, so a machine that slowed down slowed both;
in milliseconds where one of the files has none. Its noise is the band of its rounds (`band`). Two measurements differ
when their bands do not overlap, by more than `RUN_TO_RUN`, which two runs of one build may differ by although each is
steady (memory layout, clocks), and when the milliseconds moved the same way, by more than the root of that: a yardstick
that a new torch made faster slows nothing. Only fastppo's own times are judged.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastppo.bench import records
from fastppo.bench.records import OURS, Record
from fastppo.checks import require

RUN_TO_RUN = {"cpu": 1.15, "gpu": 1.05}
MANY = 8  # rounds from which percentiles say more than the extremes
AROUND = 5  # a yardstick is shorter than most ops, so one alone is noisier than they are
Key = tuple[str, str, str, str, str, int]


@dataclass(frozen=True)
class Times:
    """The rounds of one measurement, ms, and in units of the yardstick beside them; those only where it was timed."""

    rounds: list[float] = field(default_factory=list)
    relative: list[float] = field(default_factory=list)

    def add(self, rounds: Sequence[float], yardstick: Sequence[float]) -> None:
        """The rounds of one run."""
        self.rounds.extend(rounds)
        if len(rounds) == len(yardstick):
            self.relative.extend(a / b for a, b in zip(rounds, smoothed(yardstick), strict=True))


def smoothed(yardstick: Sequence[float]) -> list[float]:
    """The median of the up to `AROUND` around each; of few rounds each as it is."""
    side = AROUND // 2 if len(yardstick) >= MANY else 0
    return [statistics.median(yardstick[max(0, i - side) : i + side + 1]) for i in range(len(yardstick))]


@dataclass(frozen=True)
class Change:
    """Of one measurement: the new time over the old, in yardsticks if it can be, and the band that its noise gives."""

    key: Key
    ratio: float
    low: float
    high: float
    in_ms: float
    """The ratio without a yardstick."""

    @property
    def moved(self) -> bool:
        """Whether it is more than noise."""
        allowed = RUN_TO_RUN[self.key[4].split()[0]]
        slower = self.low > 1 and self.ratio > allowed and self.in_ms > math.sqrt(allowed)
        return slower or (self.high < 1 and self.ratio < 1 / allowed and self.in_ms < 1 / math.sqrt(allowed))


def band(rounds: Sequence[float]) -> tuple[float, float]:
    """Where the rounds lie: all of fewer than 8, the middle three fifths of fewer than 16, the middle half of more."""
    if len(rounds) < MANY:
        return min(rounds), max(rounds)
    cuts = statistics.quantiles(rounds, n=5 if len(rounds) < 2 * MANY else 4, method="inclusive")
    return cuts[0], cuts[-1]


def change(key: Key, old: Times, new: Times) -> Change:
    """In units of the yardstick where all rounds of both were timed beside it."""
    relative = all(len(times.relative) == len(times.rounds) for times in (old, new))
    before, after = (old.relative, new.relative) if relative else (old.rounds, new.rounds)
    (old_low, old_high), (new_low, new_high) = band(before), band(after)
    ratios = [statistics.median(b) / statistics.median(a) for a, b in ((before, after), (old.rounds, new.rounds))]
    return Change(key, ratios[0], new_low / old_high, new_high / old_low, ratios[1])


def times_of(lines: Iterable[Record]) -> dict[Key, Times]:
    """By what was measured; a file that holds a measurement several times has the rounds of all."""
    found: dict[Key, Times] = {}
    for line in (line for line in lines if line.get("rounds_ms")):
        found.setdefault(key_of(line), Times()).add(line["rounds_ms"], line.get(records.YARDSTICK, []))
    return found


def key_of(line: Record) -> Key:
    here: dict[str, Any] = line.get("machine", {})
    setting = json.dumps(line["setting"], sort_keys=True)
    device = f"{'cpu' if 'by_threads' in here else 'gpu'} {here.get('device', '')}"
    return line.get("suite", ""), line["op"], line["variant"], setting, device, here.get("threads", 0)


def compare(old: Path, new: Path, max_ratio: float) -> int:
    """Print what moved; how many of fastppo's times grew beyond noise and `max_ratio`, or could not be measured again.

    Raises:
        ValueError: the files have nothing in common, or the ratio is no limit.
    """
    require(max_ratio >= 1, f"--max-ratio must be >= 1, got {max_ratio}")
    lines = records.read(new)
    before, after = times_of(records.read(old)), times_of(lines)
    found = changes(before, after)
    require(
        len(found) > 0,
        f"nothing to compare: {old} ({_devices(before)}) and {new} ({_devices(after)}) hold no measurement of fastppo "
        "with the same op, setting, device and number of threads; run the same suite on the same machine",
    )
    moved = sorted((c for c in found if c.moved), key=lambda c: -c.ratio)
    worse = [c for c in moved if c.ratio > max_ratio]
    lost = {key: why for key, why in _skipped(lines).items() if key in before}
    for c in moved:
        print(_line(c, c in worse))
    for key, why in lost.items():
        print(f"LOST  {_name(key)}: not timed any more, {why}")
    missing = [key for key in before if key not in after and key not in lost and key[2].startswith(OURS)]
    allowed = _allowed(c.key for c in found)
    print(
        f"{len(found)} measurements compared, {len(moved)} moved beyond noise (bands of the rounds apart, by more than "
        f"{allowed}), {len(worse)} slower by more than {max_ratio:g}x, {len(missing)} not measured again"
    )
    return len(worse) + len(lost)


def changes(before: dict[Key, Times], after: dict[Key, Times]) -> list[Change]:
    """Of all that fastppo was measured at in both."""
    return [change(key, before[key], after[key]) for key in after if key in before and key[2].startswith(OURS)]


def _devices(keys: Iterable[Key]) -> str:
    return ", ".join(sorted({key[4] for key in keys})) or "no times"


def _skipped(lines: Iterable[Record]) -> dict[Key, str]:
    """What of fastppo's was to be measured and could not be, and why."""
    ours = (line for line in lines if line["variant"].startswith(OURS))
    return {key_of(line): line["skipped"] for line in ours if "skipped" in line}


def _allowed(keys: Iterable[Key]) -> str:
    kinds = sorted({key[4].split()[0] for key in keys})
    return ", ".join(f"{RUN_TO_RUN[kind] - 1:.0%} on a {kind.upper()}" for kind in kinds)


def _line(c: Change, worse: bool) -> str:
    verdict = "SLOWER" if worse else "slower" if c.ratio > 1 else "faster"
    return f"{verdict} {c.ratio:.2f}x (band {c.low:.2f} to {c.high:.2f}; in ms {c.in_ms:.2f}x)  {_name(c.key)}"


def _name(key: Key) -> str:
    suite, op, variant, setting, *_ = key
    return f"{suite} {op} {variant} {records.setting_text(json.loads(setting))}"
