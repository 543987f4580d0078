"""Size of the files that a checkpoint wrote."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

__all__ = ["size_of"]

_MAX_FILES = 1000


def size_of(targets: Iterable[str]) -> int:
    """Return the bytes of files, and of the files directly in folders; -1 where one is gone or is not a path."""
    try:
        return sum(map(_size, targets)) or -1
    except (OSError, ValueError):
        return -1


def _size(path: str) -> int:
    found = Path(path).stat()
    if not stat.S_ISDIR(found.st_mode):
        return found.st_size

    with os.scandir(path) as entries:
        return sum(entry.stat().st_size for entry in islice(entries, _MAX_FILES) if entry.is_file())
