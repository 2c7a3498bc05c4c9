"""The weights of the current policy, left in a folder for servers to fetch: one copy, replaced by the next."""

import fcntl
import os
import shutil
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any

from fastppo import models
from fastppo.checks import InputError

PREFIX = "fastppo-weights-"


class PublishedWeights:
    """A folder below `parent` that goes with this object, or at the next start after a process that was killed."""

    def __init__(self, parent: str) -> None:
        try:
            _remove_abandoned(Path(parent))
            self.folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        except OSError as error:
            raise InputError(f"cannot leave weights in rollout.vllm.folder = {parent!r}: {error.strerror}") from error
        self.folder.chmod(0o755)  # servers may run as somebody else
        weakref.finalize(self, _remove, self.folder, lock := (self.folder / ".lock").open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel lets go of it when the process ends, however
        except OSError as error:
            raise InputError(
                f"cannot lock a folder for weights in rollout.vllm.folder = {parent!r} ({error.strerror}): give one on "
                "a file system with flock"
            ) from error
        self.current: Path | None = None
        self.version = ""
        self.published: list[int] = []

    def publish(self, policy: Any, version: int) -> None:
        """Replace what is there by the weights of `policy`. `version` gets the name of the folder as a prefix, so
        that no two runs give one name to different weights."""
        if self.current is not None:
            shutil.rmtree(self.current)
        self.current = None
        again = self.published.count(version)  # a roll-back publishes other weights under a version that there was
        self.published.append(version)
        name = f"{version}-{again}" if again else str(version)
        target = self.folder / name
        models.save(policy, target)
        self.current, self.version = target, f"{self.folder.name.removeprefix(PREFIX)}:{name}"


def _remove_abandoned(parent: Path) -> None:
    """A killed process cannot remove its folder, which may lie in memory."""
    for folder in parent.glob(f"{PREFIX}*"):
        try:
            if time.time() - folder.stat().st_mtime < 60:  # perhaps being made
                continue
            with (folder / ".lock").open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
        except OSError:  # in use, or somebody else's
            continue


def _remove(folder: Path, lock: Any) -> None:
    if os.path.exists(folder):
        shutil.rmtree(folder, ignore_errors=True)
    lock.close()
