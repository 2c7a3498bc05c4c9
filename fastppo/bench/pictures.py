"""A roofline and the phases of an iteration, as SVG text."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastppo.bench.records import OURS, Record

WIDTH, HEIGHT, MARGIN = 760, 420, 64
NAMES = 222  # where the names of bars end, if none is longer
COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
FONT = 'font-family="sans-serif" font-size="12"'
ALWAYS = ("shape", "dtype")  # in every label
DTYPES = ("float32", "bfloat16")  # of products


def whole_setting(r: Record) -> dict[str, Any]:
    """All that tells a measurement from others of its op on a device."""
    machine = r["machine"]
    return {**({"threads": machine["threads"]} if "threads" in machine else {}), **r["setting"]}


def labels(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Shape and dtype of each, and what differs among them."""
    values: dict[str, set[str]] = {}
    for name in dict.fromkeys(name for s in settings for name in s):
        values[name] = {str(s.get(name)) for s in settings}
    told = [name for name, found in values.items() if name in ALWAYS or len(found) > 1]
    return [" ".join(_said(name, s[name]) for name in told if name in s) for s in settings]


def _said(name: str, value: Any) -> str:
    return value if isinstance(value, str) else f"{name}={value}"


@dataclass(frozen=True)
class _Plane:
    """Two logarithmic axes."""

    left: float
    right: float
    low: float
    high: float

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = math.log(x / self.left) / math.log(self.right / self.left) * (WIDTH - 2 * MARGIN)
        up = math.log(y / self.low) / math.log(self.high / self.low) * (HEIGHT - 2 * MARGIN)
        return MARGIN + across, HEIGHT - MARGIN - up

    def axes(self) -> Iterator[str]:
        for x in _powers(self.left, self.right):
            yield _text(self.at(x, self.low)[0], HEIGHT - MARGIN + 16, f"{x:g}", "middle")
        for y in _powers(self.low, self.high):
            yield _text(MARGIN - 6, self.at(self.left, y)[1] + 4, f"{y:g}", "end")
        bottom, edge = HEIGHT - MARGIN, WIDTH - MARGIN
        yield f'<path d="M{MARGIN} {MARGIN}V{bottom}H{edge}" fill="none" stroke="#999999"/>'
        yield _text(WIDTH / 2, HEIGHT - 12, "least operations / least bytes", "middle")
        yield f'<g transform="rotate(-90 16 {HEIGHT / 2})">{_text(16, HEIGHT / 2, "GFLOP/s", "middle")}</g>'


def _powers(low: float, high: float) -> list[float]:
    return [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]


def roofline(lines: Sequence[Record]) -> str:
    """fastppo's operations per second over operations per byte, under the highest rates that were measured there."""
    points = [r for r in lines if has_point(r)]
    copy = max(r["machine"]["copy_gb_per_s"] for r in points)
    peaks: dict[str, float] = {}
    for r in points:
        rate = r["machine"][f"matmul_{_dtype(r)}_gflop_per_s"]
        peaks[_dtype(r)] = max(rate, peaks.get(_dtype(r), 0.0))
    colors = dict(zip(sorted(peaks), COLORS, strict=False))
    plane = _plane(points, copy, max(peaks.values()))
    body = [*plane.axes(), _text(MARGIN + 8, MARGIN - 12, f"copy {copy:.4g} GB/s (the slope)")]
    for dtype in sorted(peaks, key=lambda dtype: peaks[dtype], reverse=True):  # the lower ones stay to be seen
        body += _roof(plane, copy, peaks[dtype], dtype, colors[dtype])
    names = labels([whole_setting(r) for r in points])
    body += [_point(plane, r, name, colors[_dtype(r)]) for r, name in zip(points, names, strict=True)]
    return _svg(WIDTH, HEIGHT, body)


def has_point(r: Record) -> bool:
    return r["variant"] == OURS and bool(r.get("least_flops"))


def _dtype(r: Record) -> str:
    """Of the products it was held to: a CPU multiplies what is stored in bfloat16 in float32."""
    peak = r["gflop_per_s"] / r["mfu"]
    return min(DTYPES, key=lambda dtype: abs(r["machine"][f"matmul_{dtype}_gflop_per_s"] - peak))


def _plane(points: Sequence[Record], copy: float, peak: float) -> _Plane:
    """Room for the points, and for the roof on both sides of where it bends."""
    xs, ys = [_intensity(r) for r in points], [r["gflop_per_s"] for r in points]
    ridge = peak / copy
    return _Plane(min(*xs, ridge / 8) / 2, max(*xs, ridge * 8) * 2, min(*ys, peak / 100) / 2, peak * 2)


def _intensity(r: Record) -> float:
    return r["least_flops"] / r["least_bytes"]


def _roof(plane: _Plane, copy: float, peak: float, dtype: str, color: str) -> list[str]:
    start = max(plane.left, plane.low / copy)
    corners = [plane.at(x, min(x * copy, peak)) for x in (start, peak / copy, plane.right)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    return [
        f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>',
        _text(WIDTH - MARGIN, corners[-1][1] - 8, f"matmul {dtype} {peak:.4g} GFLOP/s", "end"),
    ]


def _point(plane: _Plane, r: Record, name: str, color: str) -> str:
    x, y = plane.at(_intensity(r), r["gflop_per_s"])
    what = html.escape(f"{r['op']} {name}".strip())
    title = f"<title>{what}: {r['gflop_per_s']:.4g} GFLOP/s</title>"
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{color}" stroke="#ffffff">{title}</circle>'


def phase_bars(lines: Sequence[Record], phases: Sequence[str]) -> str:
    """A bar per setting of the step benchmark: the share of each phase, its milliseconds in the tooltip."""
    settings: dict[str, dict[str, Any]] = {}
    times: dict[str, dict[str, float]] = {}
    for r in lines:
        if r["op"] in phases and "median_ms" in r:
            whole = whole_setting(r)
            settings[str(whole)] = whole
            times.setdefault(str(whole), {})[r["op"]] = r["median_ms"]
    names, body = labels(list(settings.values())), _legend(phases)
    end = max([NAMES, *(7.0 * len(name) for name in names)])
    for row, (name, of_phase) in enumerate(zip(names, times.values(), strict=True)):
        body += _bar(name, {phase: of_phase.get(phase, 0.0) for phase in phases}, end, 40 + 34 * row)
    return _svg(WIDTH + round(end) - NAMES, 40 + 34 * len(names) + 30, body)


def _legend(phases: Sequence[str]) -> list[str]:
    body = []
    for i, phase in enumerate(phases):
        x = 12 + 105 * i
        body.append(f'<rect x="{x}" y="10" width="12" height="12" fill="{COLORS[i % len(COLORS)]}"/>')
        body.append(_text(x + 17, 21, phase))
    return body


def _bar(name: str, times: dict[str, float], end: float, y: int) -> list[str]:
    """Its name ends at `end`, its total stands behind it."""
    x, total, body = end + 8, sum(times.values()), [_text(end, y + 17, name, "end")]
    for i, (phase, ms) in enumerate(times.items()):
        width, color = 440 * ms / total, COLORS[i % len(COLORS)]
        title = f"<title>{phase}: {ms:.4g} ms</title>"
        body.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="24" fill="{color}">{title}</rect>')
        x += width
    return [*body, _text(end + 456, y + 17, f"{total:.4g} ms")]


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {FONT}>{html.escape(text)}</text>'


def _svg(width: int, height: int, body: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="#ffffff"/>', *body, "</svg>"]) + "\n"
