"""What a person sees: the progress bar of a run and tables of results."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

Show = Callable[[Mapping[str, float]], None]
SHOWN = (  # metric, label, format
    ("objective/scores", "reward", "{:.3f}"),
    ("objective/kl", "kl", "{:.2f}"),
    ("loss", "loss", "{:.3f}"),
    ("perf/tokens_per_second", "tok/s", "{:.0f}"),
)


@contextmanager
def progress(total: int, *, done: int = 0, title: str = "ppo", quiet: bool = False) -> Iterator[Show]:
    """A bar with reward, KL and tokens/s; without a terminal, a plain line now and then; nothing when `quiet`."""
    console = Console(stderr=True, quiet=quiet)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    numbers_column = TextColumn("{task.fields[numbers]}")
    with Progress(*columns, numbers_column, console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(title, total=total, completed=done, numbers="")
        every = max(1, total // 10)

        def show(metrics: Mapping[str, float]) -> None:
            nonlocal done
            done += 1
            shown = ((label, form.format(metrics[name])) for name, label, form in SHOWN if name in metrics)
            numbers = "  ".join(f"{label} {number}" for label, number in shown)
            bar.update(task, advance=1, numbers=numbers)
            if not quiet and not console.is_terminal and (done % every == 0 or done == total):
                print(f"{title} {done}/{total}  {numbers}", flush=True)

        yield show


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table."""
    out = Table(title=title, title_justify="left")
    for name in header:
        out.add_column(name, overflow="fold")
    for row in rows:
        out.add_row(*(str(x) for x in row))
    Console().print(out)
