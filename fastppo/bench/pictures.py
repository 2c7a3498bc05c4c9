"""A roofline and the phases of an iteration, as SVG text."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence

from fastppo.bench.records import OURS, Record

WIDTH, HEIGHT, MARGIN = 760, 420, 64
COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
FONT = 'font-family="sans-serif" font-size="12"'


def roofline(records: Sequence[Record], machine: Record) -> str:
    """Operations per second over operations per byte, both logarithmic: fastppo's ops under the machine's two roofs."""
    points = [
        (r["least_flops"] / r["least_bytes"], r["gflop_per_s"], f"{r['op']} {_short_setting(r)}")
        for r in records
        if r["variant"] == OURS and r.get("least_flops")
    ]
    peak = max(machine["matmul_float32_gflop_per_s"], machine["matmul_bfloat16_gflop_per_s"])
    ridge = peak / machine["copy_gb_per_s"]
    left, right = min([x for x, *_ in points] + [ridge / 8]) / 2, max([x for x, *_ in points] + [ridge * 8]) * 2
    low, high = min([y for _, y, _ in points] + [peak / 100]) / 2, peak * 2

    def at(x: float, y: float) -> tuple[float, float]:
        across = math.log(x / left) / math.log(right / left) * (WIDTH - 2 * MARGIN)
        up = math.log(y / low) / math.log(high / low) * (HEIGHT - 2 * MARGIN)
        return MARGIN + across, HEIGHT - MARGIN - up

    start = max(left, low / machine["copy_gb_per_s"])
    corners = [at(start, start * machine["copy_gb_per_s"]), at(ridge, peak), at(right, peak)]
    roof = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    body = [
        f'<polyline points="{roof}" fill="none" stroke="#333333" stroke-width="2"/>',
        _text(WIDTH - MARGIN, corners[1][1] - 8, f"matmul {peak:.4g} GFLOP/s", "end"),
        _text(MARGIN + 8, MARGIN + 16, f"copy {machine['copy_gb_per_s']:.4g} GB/s (the slope)"),
        _text(WIDTH / 2, HEIGHT - 12, "least operations / least bytes", "middle"),
        f'<g transform="rotate(-90 16 {HEIGHT / 2})">{_text(16, HEIGHT / 2, "GFLOP/s", "middle")}</g>',
        *_ticks(left, right, low, high, at),
    ]
    for i, (x, y, name) in enumerate(points):
        across, up = at(x, y)
        body.append(
            f'<circle cx="{across:.1f}" cy="{up:.1f}" r="5" fill="{COLORS[i % len(COLORS)]}">'
            f"<title>{html.escape(name)}: {y:.4g} GFLOP/s</title></circle>"
        )
    return _svg(WIDTH, HEIGHT, body)


def _ticks(
    left: float, right: float, low: float, high: float, at: Callable[[float, float], tuple[float, float]]
) -> list[str]:
    out = []
    for power in range(math.ceil(math.log10(left)), math.floor(math.log10(right)) + 1):
        out.append(_text(at(10.0**power, low)[0], HEIGHT - MARGIN + 16, f"{10.0**power:g}", "middle"))
    for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1):
        out.append(_text(MARGIN - 6, at(left, 10.0**power)[1] + 4, f"{10.0**power:g}", "end"))
    bottom, edge = HEIGHT - MARGIN, WIDTH - MARGIN
    out.append(f'<path d="M{MARGIN} {MARGIN}V{bottom}H{edge}" fill="none" stroke="#999999"/>')
    return out


def phase_bars(records: Sequence[Record], phases: Sequence[str]) -> str:
    """A bar per setting of the step benchmark: the share of each phase, its milliseconds in the tooltip."""
    settings: dict[str, dict[str, float]] = {}
    for r in records:
        if r["op"] in phases and "median_ms" in r:
            settings.setdefault(_short_setting(r), {})[r["op"]] = r["median_ms"]
    height, body = 40 + 34 * len(settings) + 30, []
    for i, phase in enumerate(phases):
        x = 12 + 105 * i
        body.append(f'<rect x="{x}" y="10" width="12" height="12" fill="{COLORS[i % len(COLORS)]}"/>')
        body.append(_text(x + 17, 21, phase))
    for row, (name, times) in enumerate(settings.items()):
        x, y, total = 230.0, 40 + 34 * row, sum(times.values())
        body.append(_text(222, y + 17, name, "end"))
        for i, phase in enumerate(phases):
            width = 440 * times.get(phase, 0.0) / total
            title = f"<title>{phase}: {times.get(phase, 0.0):.4g} ms</title>"
            color = COLORS[i % len(COLORS)]
            body.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="24" fill="{color}">{title}</rect>')
            x += width
        body.append(_text(678, y + 17, f"{total:.4g} ms"))
    return _svg(WIDTH, height, body)


def _short_setting(r: Record) -> str:
    s = r["setting"]
    if "shape" in s:
        return f"{s['shape']} {s['dtype']} {s['lengths']}"
    return " ".join(str(s[name]) if name == "dtype" else f"{name}={s[name]}" for name in ("dtype", *"RHV") if name in s)


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {FONT}>{html.escape(text)}</text>'


def _svg(width: int, height: int, body: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="#ffffff"/>', *body, "</svg>"]) + "\n"
