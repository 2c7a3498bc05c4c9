"""Where numbers go: metrics.jsonl always; TensorBoard, Weights & Biases, trackio when asked; phase times."""

import importlib.util
import itertools
import json
import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from fastppo.checks import require
from fastppo.durable import replace_text


class Logger(Protocol):
    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class JSONLLogger:
    """One JSON object per line, flushed at once, so that nothing is lost with the process."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a", encoding="utf-8")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no NaN
        self.file.write(json.dumps({"step": step, **finite}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class TensorBoardLogger:
    def __init__(self, folder: Path, kept: int) -> None:
        module = importlib.import_module("torch.utils.tensorboard")
        self.writer = module.SummaryWriter(str(folder / "tensorboard"), purge_step=kept + 1 if kept else None)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class RunLogger:
    """Weights & Biases or trackio: both have init, log and finish."""

    def __init__(self, module: str, folder: Path, config: Mapping[str, Any]) -> None:
        self.module = importlib.import_module(module)
        one_run = {"id": _run_id(folder)} if module == "wandb" else {}  # trackio goes by the name
        self.module.init(project="fastppo", name=folder.name, config=dict(config), resume="allow", **one_run)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.module.log(dict(metrics), step=step)

    def close(self) -> None:
        self.module.finish()


def _run_id(folder: Path) -> str:
    """What Weights & Biases knows this run by, also when it goes on after a stop."""
    path = folder / "wandb_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex, encoding="utf-8")
    return path.read_text(encoding="utf-8")


def require_loggers(loggers: Sequence[str]) -> None:
    """Look for the packages of the loggers before anything is loaded.

    Raises:
        ValueError: a logger's package is not installed.
    """
    for name in loggers:
        spec = importlib.util.find_spec(name)
        installed = spec is not None and spec.origin is not None  # None: a folder of that name, e.g. ./wandb
        require(installed, f"train.loggers asks for {name!r}, which is not installed: pip install 'fastppo[{name}]'")


class Metrics:
    """All loggers of a run as one; none at all without a folder (a rank that writes nothing).

    `kept`: the iterations that were logged before, by a run that goes on.
    """

    def __init__(self, folder: Path | None, loggers: Sequence[str], config: Mapping[str, Any], kept: int = 0) -> None:
        self.loggers: list[Logger] = []
        if folder is None:
            return
        require_loggers(loggers)
        self.loggers.append(JSONLLogger(folder / "metrics.jsonl"))
        for name in loggers:
            board = name == "tensorboard"
            self.loggers.append(TensorBoardLogger(folder, kept) if board else RunLogger(name, folder, config))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for logger in self.loggers:
            logger.log(metrics, step)

    def close(self) -> None:
        for logger in self.loggers:
            logger.close()


def rewind(folder: Path, step: int, *, evaluates: bool = True) -> None:
    """Move what comes after iteration `step` out of metrics.jsonl and samples.jsonl into `*.dropped.jsonl`.

    `evaluates`: the run goes on by evaluating that iteration, so that the evaluation there was is dropped too.
    """
    for name in ("metrics", "samples"):
        path = folder / f"{name}.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        kept = [_is_until(line, step, evaluates) for line in lines]
        if all(kept):
            continue
        with (folder / f"{name}.dropped.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(line.rstrip("\n") + "\n" for line in itertools.compress(lines, (not k for k in kept)))
        replace_text(path, "".join(itertools.compress(lines, kept)))


def _is_until(line: str, step: int, evaluates: bool) -> bool:
    try:
        row = json.loads(line)
        again = evaluates and "episode" not in row
        return (row["step"] < step or (row["step"] == step and not again)) and line.endswith("\n")
    except (ValueError, KeyError, TypeError):  # the line that was being written when the process died
        return False


class PhaseTimer:
    """Seconds of each phase of an iteration, under `time/<phase>`.

    `announce` is told of each as it begins, and each runs inside its `span`.
    """

    def __init__(
        self,
        announce: Callable[[str], None] = lambda phase: None,
        span: Callable[[str], AbstractContextManager[Any]] = lambda phase: nullcontext(),
    ) -> None:
        self.announce, self.span = announce, span
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.announce(phase)
        start = time.perf_counter()
        try:
            with self.span(phase):
                yield
        finally:
            self.seconds[f"time/{phase}"] = time.perf_counter() - start

    def total(self) -> float:
        return sum(self.seconds.values())
