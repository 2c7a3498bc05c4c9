"""Files that survive a loss of power: what was written is on the disk, and a file is the old one or the new one."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Until the content of the file, or the names in the folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write `path`; killed at any moment, it has its old content or the new one."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(path)
    sync(path.parent)
