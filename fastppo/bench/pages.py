"""`fastppo bench report`: docs/benchmarks.md and the pictures, from a folder of records. No figure is typed by hand."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fastppo.bench import pictures, records
from fastppo.bench.records import OURS, Record
from fastppo.bench.step import PHASES
from fastppo.checks import require

INTRO = """# Benchmarks

Made by `fastppo bench report` from the JSON lines in `{folder}`: run it again after adding some.

- error: of an op, checked against float64 before it is timed, the largest difference over the largest number; of
  sampling, the gap between the log-probs of the tokens and the trainer's, as a share of what is allowed. A dash:
  nothing to compare with. An iteration is checked for its optimizer steps and its first ratio.
- times: medians over rounds in which all variants ran in turn, with the 20th and 80th percentiles; "x fastppo" is the
  median over rounds of the ratio. Ratios are taken within a run: where the time that one is over was measured again
  later, a note says about what it was then.
- of floor: the least time that the least bytes or the least operations take at the copy and matmul rates measured on
  the same machine, over the time. More than 100 %: on a CPU, what a short call wrote may be in the caches still, and
  peers that multiply in bfloat16 were held to float32's rate before commit 93a17bd. MFU: the share of that matmul rate
  (for a step, model operations, none counted twice).

[benchmarking.md](benchmarking.md) says how to repeat them.
"""
COLUMNS = (  # name, heading, format
    ("median_ms", "median ms", ".4g"),
    ("p20_ms", "p20", ".4g"),
    ("p80_ms", "p80", ".4g"),
    ("times_fastppo", "x fastppo", ".2f"),
    ("graph_ms", "graph ms", ".4g"),
    ("of_floor", "of floor", ".1%"),
    ("mfu", "MFU", ".1%"),
    ("tokens_per_s", "tokens/s", ".4g"),
    ("times_fixed", "x fixed", ".3f"),
    ("peak_extra_mb", "extra MB", ".1f"),
    ("peak_mb", "peak MB", ".0f"),
    ("error", "error", ".1e"),
)
TITLES = {
    "kernels": "Kernels",
    "step": "One PPO iteration by phase",
    "rollout": "Sampling",
    "end-to-end": "End to end",
}


def main(argv: list[str]) -> None:
    made = argparse.ArgumentParser(prog="fastppo bench report", description=__doc__)
    made.add_argument("folder", type=Path, nargs="?", default=Path("bench/results"), help="with *.jsonl")
    made.add_argument("--docs", type=Path, default=Path("docs/benchmarks.md"))
    options = made.parse_args(argv)
    for path, text in pages(options.folder, options.docs).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path)


def pages(folder: Path, docs: Path) -> dict[Path, str]:
    """Every file of the report and what is in it."""
    files = sorted(folder.glob("*.jsonl"))
    require(
        len(files) > 0, f"{str(folder)!r} has no *.jsonl: `fastppo bench SUITE --out {folder}/NAME.jsonl` writes some"
    )
    lines = (line for path in files for line in records.read(path))
    shown = newest(line for line in lines if line.get("suite") in TITLES)  # memory plans are on a page of their own
    found = explained(shown)
    out: dict[Path, str] = {}
    text = [INTRO.format(folder=os.path.relpath(folder, docs.parent.parent).replace(os.sep, "/"))]
    for device, lines in by(found, lambda r: r["machine"]["device"]):
        text += [f"\n## {device}\n", machine_text(lines)]
        for suite, title in TITLES.items():
            mine = [r for r in lines if r.get("suite") == suite]
            if not mine:
                continue
            text.append(f"\n### {title}\n")
            if (picture := drawn(suite, mine)) is not None:
                path = folder / f"{suite}-{slug(device)}.svg"
                out[path] = picture
                text.append(f"![{title}]({os.path.relpath(path, docs.parent).replace(os.sep, '/')})\n")
            text += [section(group) for _, group in by(mine, group_of)]
    return {docs: "\n".join(text).rstrip() + "\n", **out}


def newest(lines: Iterable[Record]) -> list[Record]:
    """Of measurements of the same thing, the last; in order of first appearance."""
    return list({thing(line): line for line in lines}.values())


def thing(r: Record) -> tuple[str, ...]:
    """What was measured, and where."""
    what = r.get("suite", ""), r["op"], str(r["setting"]), r["variant"]
    return *what, r["machine"]["device"], str(r["machine"].get("threads", 0))


def explained(lines: Sequence[Record]) -> list[Record]:
    """The lines of a page, with notes on the ratios that its times contradict."""
    shown = {thing(r): r for r in lines}
    return [r | {"note": "; ".join(filter(None, [r.get("note", ""), *of_another_run(r, shown)]))} for r in lines]


def of_another_run(r: Record, shown: dict[tuple[str, ...], Record]) -> list[str]:
    """Of its ratios, those to a time that is not the one shown; the medians tell about what that was."""
    over = {
        "times_fastppo": r | {"variant": OURS},
        "times_fixed": r | {"setting": r["setting"] | {"lengths": "fixed"}},
    }
    headings = {name: heading for name, heading, _ in COLUMNS}
    return [
        f"{headings[name]} is over about {r['median_ms'] / r[name]:.4g} ms, of another run"
        for name, other in over.items()
        if name in r and not same_run(r, shown.get(thing(other), {}))
    ]


def same_run(a: Record, b: Record) -> bool:
    """The rates of a machine are measured once per process, the yardstick beside the variants of a case."""
    return all(a.get(name) == b.get(name) for name in ("machine", records.YARDSTICK))


def by(lines: Iterable[Record], key: Callable[[Record], str]) -> list[tuple[str, list[Record]]]:
    """Groups of lines, in the order of their first ones."""
    groups: dict[str, list[Record]] = {}
    for line in lines:
        groups.setdefault(key(line), []).append(line)
    return list(groups.items())


def group_of(r: Record) -> str:
    """What shares a table: the variants of a case; the phases of a setting."""
    first = "" if r["suite"] == "step" else r["op"]
    return f"{first} {records.setting_text(pictures.whole_setting(r))}".strip()


def machine_text(lines: Sequence[Record]) -> str:
    """Rates and versions; measurements of several commits or versions are all named."""
    out = []
    for commit, group in by(lines, lambda r: r["machine"]["commit"]):
        here = group[0]["machine"]
        rates = ", ".join(
            f"{name.replace('_gflop_per_s', ' GFLOP/s').replace('_gb_per_s', ' GB/s').replace('_', ' ')} {here[name]:g}"
            for name in ("copy_gb_per_s", "matmul_float32_gflop_per_s", "matmul_bfloat16_gflop_per_s")
            if name in here
        )
        versions: dict[str, str] = {}
        for r in group:
            versions |= r["machine"]["versions"] | r.get("peer_versions", {})
        named = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
        driver = f", {here['driver']}" if "driver" in here else ""
        out.append(f"Commit {commit}, {here['threads']} threads{driver}; {rates or 'rates not measured'}. {named}.\n")
    return "\n".join(out)


def drawn(suite: str, lines: Sequence[Record]) -> str | None:
    """The picture of a suite, if it has one."""
    if suite == "kernels" and any(pictures.has_point(r) for r in lines):
        return pictures.roofline(lines)
    if suite == "step" and any("median_ms" in r for r in lines):
        return pictures.phase_bars(lines, PHASES)
    return None


def section(lines: Sequence[Record]) -> str:
    """A table of what was timed, and what was not and why."""
    first = lines[0]
    if first["op"] == "ppo_reward":
        return reward_table(lines)
    label = "op" if first["suite"] == "step" else "variant"
    timed = [r for r in lines if "skipped" not in r]
    columns = [c for c in COLUMNS if any(c[0] in r for r in timed)]
    out = [f"**{group_of(first)}**\n"]
    if timed:
        rows = [[r[label], *(records.cell(r, n, form) for n, _, form in columns), r.get("note", "")] for r in timed]
        out.append(table([label, *(heading for _, heading, _ in columns), ""], rows))
    out += [f"{r[label]}: not timed, {r['skipped']}  " for r in lines if "skipped" in r]
    return "\n".join(out) + "\n"


def reward_table(lines: Sequence[Record]) -> str:
    """What both systems learn on one problem."""
    timed = [r for r in lines if "skipped" not in r]
    names = ("reward_first", "reward_last", "reward_sd", "difference", "noise")
    heading = ["system", "first", "last", "sd over seeds", "off fastppo's by", "noise (2 standard errors)"]
    rows = [[r["variant"], *(f"{r[name]:.4g}" for name in names)] for r in timed]
    setting = records.setting_text(lines[0]["setting"])
    text = (
        "Mean reward of the first and of the last 5 of {} iterations; same models, prompts, lengths, epochs and seeds."
    )
    count = len(timed[0]["rewards"][0]) if timed else 0
    out = [f"**ppo_reward {setting}**\n", text.format(count) + "\n", table(heading, rows)]
    return "\n".join([*out, *(f"{r['variant']}: not run, {r['skipped']}  " for r in lines if "skipped" in r)]) + "\n"


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines) + "\n"


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
