"""What a person sees: the progress bar of a run, tables of results, how a run ended."""

import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

SHOWN = (  # metric, label, format; z: what rounds to zero has no sign
    ("objective/scores", "reward", "{:z.3f}"),
    ("objective/kl", "kl", "{:z.2f}"),
    ("loss", "loss", "{:z.3f}"),
    ("perf/tokens_per_second", "tok/s", "{:.0f}"),
)
SILENCE_S = 20.0  # without a terminal, the longest that steps may pass without a line


@dataclass
class Phase:
    """What runs now. Its text is made whenever the bar is drawn, and empty while the phase is short."""

    name: str = ""
    start: float = field(default_factory=lambda: time.monotonic())

    def __str__(self) -> str:
        seconds = time.monotonic() - self.start
        return f"{self.name} {seconds:.0f} s" if self.name and seconds >= 1 else ""


class Show:
    """Call it with the metrics of every step that is done; `phase` names what runs until the next call.

    On a terminal both are drawn in the bar. Without one the first step and every tenth of them is a line, and so is a
    step or a phase that begins after `SILENCE_S` without a line.
    """

    def __init__(self, bar: Progress, task: TaskID, *, plain: bool) -> None:
        self.bar, self.task, self.plain = bar, bar.tasks[task], plain
        self.total = int(self.task.total or 0)
        self.every = max(1, self.total // 10)
        self.spoke = self.stepped = time.monotonic()

    def __call__(self, metrics: Mapping[str, float]) -> None:
        shown = ((label, form.format(metrics[name])) for name, label, form in SHOWN if name in metrics)
        numbers = "  ".join(f"{label} {number}" for label, number in shown)
        self.bar.update(self.task.id, advance=1, numbers=numbers, phase=Phase())
        self.stepped = time.monotonic()
        done = int(self.task.completed)
        if done % self.every == 0 or done in (1, self.total) or self.stepped - self.spoke >= SILENCE_S:
            self._print(numbers)

    def phase(self, name: str) -> None:
        """`name` begins."""
        self.bar.update(self.task.id, phase=Phase(name))
        if time.monotonic() - max(self.spoke, self.stepped) >= SILENCE_S:
            self._print(f"{name} ...")

    def _print(self, text: str) -> None:
        self.spoke = time.monotonic()
        if self.plain:
            print(f"{self.task.description} {self.task.completed:.0f}/{self.total}  {text}", flush=True)


@contextmanager
def progress(total: int, *, done: int = 0, title: str = "ppo", quiet: bool = False) -> Iterator[Show]:
    """A bar with reward, KL, tokens/s and what runs now; without a terminal, lines; nothing when `quiet`."""
    console = Console(stderr=True, quiet=quiet)
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    texts = (TextColumn("{task.fields[numbers]}"), TextColumn("{task.fields[phase]}"))
    with Progress(*columns, *texts, console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(title, total=total, completed=done, numbers="", phase=Phase())
        yield Show(bar, task, plain=not quiet and not console.is_terminal)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table under its title, which may be wider than the table."""
    out = Table()
    for name in header:
        out.add_column(name, overflow="fold")
    for row in rows:
        out.add_row(*(str(x) for x in row))
    print(title)
    Console().print(out)


def summary(folder: Path) -> None:
    """Print what the first and the last evaluation of a run gave, how it drifted, and where it is."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluations = [row for row in rows if row.get("eval/scores") is not None]
    ends = {row["step"]: row["eval/scores"] for row in (*evaluations[:1], *evaluations[-1:])}
    if ends:
        print("held-out score:", " -> ".join(f"{score:z.3f} (iteration {step})" for step, score in ends.items()))
    for line in _drifts(rows):
        print(line)
    print(f"run folder: {folder}", flush=True)


def _drifts(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """A line for each monitor that crossed its threshold."""
    lines = []
    for name in sorted({key for row in rows for key in row if key.startswith("watch/")}):
        alarms = [(row["step"], row[name]) for row in rows if name in row]
        pairs = itertools.pairwise([(0, 0.0), *alarms])
        began = [step for (_, before), (step, on) in pairs if on and not before]
        if began:
            times = "once" if len(began) == 1 else f"{len(began)} times"
            end = ", and is beyond it at the end" if alarms[-1][1] else ""
            lines.append(f"watch: {name[6:]} crossed its threshold {times}, first in iteration {began[0]}{end}")
    return lines
