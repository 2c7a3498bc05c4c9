"""Checkpoints of a run: a copy in host memory is taken between two iterations, and a thread writes it."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from fastppo import checkpoint, distributed, kept_rollout
from fastppo.durable import sync

if TYPE_CHECKING:
    from fastppo.run import Run


class Writer:
    """Runs one job at a time in a thread; what it raises is raised by the next call."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Begin `job`, after the one before: no more than one copy is held."""
        self.wait()
        self._pending = self._pool.submit(job)

    def check(self) -> None:
        """Raise what the last job raised, if it is over."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Until the last job is over; raises what it raised."""
        if self._pending is not None:
            error = self._pending.exception()
            self._pending = None
            if error is not None:
                raise error

    def close(self) -> None:
        """Until the last job is over."""
        self._pool.shutdown()


def save(run: "Run", name: str, *, wait: bool = False) -> Path:
    """Write `checkpoints/<name>`: policy, critic, tokenizer, and from where the run goes on unless inside an update.

    Raises:
        CheckpointError: with `wait` or without `train.async_save`, it cannot be written; or the one before could not.
    """
    folder = run.folder / "checkpoints" / name
    run.saved = run.boundary is not None
    if distributed.rank() == 0:
        run.writer.wait()  # before the copy: there is room for one
        aside = run.config.train.async_save and not wait
        copies: dict[object, Tensor] = {}
        copy = partial(_in_host_memory, copies=copies) if aside else dict
        weights = {role: copy(state) for role, state in run.engine.weights().items()}
        tensors = copy(run.engine.tensors()) if run.boundary else {}
        job = partial(_write, folder, partial(run.engine.save, weights=weights), run.boundary, tensors)
        run.writer.submit(partial(job, keep_last=run.config.train.keep_last))
        if not aside:
            run.writer.wait()
    return folder


def _write(folder: Path, save_models: Callable[[Path], None], numbers: Mapping[str, object] | None,
           tensors: Mapping[str, Tensor], *, keep_last: int) -> None:  # fmt: skip
    for log in folder.parent.parent.glob("*.jsonl"):  # a state is never ahead of its log
        sync(log)
    checkpoint.write(folder, save_models, numbers, tensors)
    checkpoint.prune(folder.parent, keep_last)


def _in_host_memory(tensors: Mapping[str, Tensor], copies: dict[object, Tensor]) -> dict[str, Tensor]:
    """Copies by name; tensors that are one, as tied weights and float32 masters are, stay one."""
    out = {}
    for name, x in tensors.items():
        place = (x.data_ptr(), x.shape, x.stride()) if x.numel() else name
        if place not in copies:
            copies[place] = x.detach().to("cpu", copy=True)
        out[name] = copies[place]
    return out


@contextmanager
def saved_on_failure(run: "Run") -> Iterator[None]:
    """Whatever ends the run, the weights trained so far are on disk afterwards.

    Raises:
        Exception: they could not be saved, and the run was about to end as if they were, with SystemExit.
    """
    try:
        yield
    except BaseException as error:
        failure = _save_interrupted(run, "failed" if isinstance(error, Exception) else "interrupted")
        if failure is not None and isinstance(error, SystemExit):
            raise failure from error
        raise
    finally:
        run.close()


def _save_interrupted(run: "Run", why: str) -> Exception | None:
    """Unless nothing was trained, and say so. Returns what went wrong: what ended the run matters more."""
    try:
        run.writer.wait()
    except Exception as error:
        _say(error)
    if run.engine.version == 0:
        _say(f"{why} before the end of the first iteration: nothing was trained, so nothing is saved")
        return None
    name, way = ("interrupted", "--resume goes on from it")
    if run.boundary is None:
        name, way = "interrupted-weights", "weights alone; --resume goes on from the newest other checkpoint"
    try:
        _say(f"{why} after {run.step} iterations: saved {save(run, name, wait=True)} ({way})")
        kept_rollout.write(run)  # every rank its own
    except Exception as error:
        _say(f"{why} after {run.step} iterations; could not save {name}: {error}")
        return error
    return None


def _say(what: object) -> None:
    if distributed.rank() == 0:
        with suppress(OSError):  # Ctrl-C may have ended who reads this
            print(what, flush=True)
