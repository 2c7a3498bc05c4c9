"""Where numbers go: metrics.jsonl always; TensorBoard, Weights & Biases, trackio when asked; phase times."""

import importlib.util
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from fastppo.checks import require


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
    def __init__(self, folder: Path) -> None:
        self.writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class RunLogger:
    """Weights & Biases or trackio: both have init, log and finish."""

    def __init__(self, module: str, folder: Path, config: Mapping[str, Any]) -> None:
        self.module = importlib.import_module(module)
        self.module.init(project="fastppo", name=folder.name, config=dict(config))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.module.log(dict(metrics), step=step)

    def close(self) -> None:
        self.module.finish()


def require_loggers(loggers: Sequence[str]) -> None:
    """
    Raises:
        ValueError: a logger's package is not installed.
    """
    for name in loggers:
        spec = importlib.util.find_spec(name)
        installed = spec is not None and spec.origin is not None  # None: a folder of that name, e.g. ./wandb
        require(installed, f"train.loggers asks for {name!r}, which is not installed: pip install 'fastppo[{name}]'")


class Metrics:
    """All loggers of a run as one; none at all without a folder (a rank that writes nothing)."""

    def __init__(self, folder: Path | None, loggers: Sequence[str], config: Mapping[str, Any]) -> None:
        self.loggers: list[Logger] = []
        if folder is None:
            return
        require_loggers(loggers)
        self.loggers.append(JSONLLogger(folder / "metrics.jsonl"))
        for name in loggers:
            self.loggers.append(TensorBoardLogger(folder) if name == "tensorboard" else RunLogger(name, folder, config))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for logger in self.loggers:
            logger.log(metrics, step)

    def close(self) -> None:
        for logger in self.loggers:
            logger.close()


class PhaseTimer:
    """Seconds of each phase of an iteration, under `time/<phase>`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[f"time/{phase}"] = time.perf_counter() - start

    def total(self) -> float:
        return sum(self.seconds.values())
