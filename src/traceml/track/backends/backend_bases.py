"""Bases of the built-in backends: of those that send a batch of values in one call, and of those that append to a file.

Such a file only grows, and a restart cuts it back to its confirmed length.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from traceml.errors import BackendError
from traceml.track.plugins.interfaces import BackendInterface
from traceml.track.plugins.metric import Metric

__all__ = ["AppendFile", "BatchBackend", "FileBackend", "cut_back"]


class BatchBackend(BackendInterface):
    """Sends one value as a batch of one, and keeps the time of the end; subclasses have `log_metrics`."""

    _ended: float | None = None
    """Epoch seconds at which the training ended; None if unknown."""

    def log_metric(self, name: str, value: float, step: int) -> None:
        """Send one value."""
        self.log_metrics([Metric(name, value, step)])

    def end_time(self, timestamp: float) -> None:
        """Keep the time for the run's end."""
        self._ended = timestamp

    @property
    def _row_s(self) -> float:
        """Epoch seconds of what the current call sends: those of the training, else now."""
        return time.time() if self.row_time is None else self.row_time


class AppendFile:
    """Appends to a file without buffering: what `write` returned from survives the death of this process.

    Args:
        keep: keep what is in it; else start empty.
    """

    def __init__(self, path: Path, *, keep: bool = True) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | (0 if keep else os.O_TRUNC)
        self._descriptor = os.open(path, flags, 0o666)

    @property
    def size(self) -> int:
        """Length in bytes."""
        return os.fstat(self._descriptor).st_size

    def write(self, data: bytes) -> None:
        """Append data, or nothing of it.

        Raises:
            OSError: it cannot be written, typically on a full disk.
        """
        before, view = self.size, memoryview(data)
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError:
            os.ftruncate(self._descriptor, before)
            raise

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def cut_back(path: Path, size: int) -> None:
    """Cut a file off after its confirmed length.

    Raises:
        BackendError: the file is shorter, so confirmed data is missing.
    """
    found = _size_of(path)
    if found < size:
        gone = "" if path.exists() else "is gone: it "
        raise BackendError(f"{path} {gone}has {found} bytes, fewer than the {size} that were delivered")

    if found:
        os.truncate(path, size)


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


class FileBackend(BatchBackend):
    """Base of the backends that append to one local file. Exact: `resume` cuts off what comes after the mark.

    Args:
        keep: continue the file of an earlier run.
    """

    def __init__(self, folder: Path, path: Path, *, keep: bool = False) -> None:
        self._root, self._path, self._keep = folder, path, keep
        self._file: AppendFile | None = None

    @property
    def target(self) -> str:
        """The folder."""
        return str(self._root)

    @property
    def is_local(self) -> bool:
        """True."""
        return True

    def resume(self, mark: Mapping[str, Any]) -> bool:
        """Cut off what comes after the mark; request the run from its first row if somebody removed what it had.

        A file with rows of an earlier run cannot be written again.
        """
        path = self._place_of(Path(mark["path"]))
        if _size_of(path) < mark["offset"] and not self._keep:
            return False

        self._path, self._keep = path, True
        cut_back(self._path, mark["offset"])
        return True

    def end_experiment(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def mark(self) -> dict[str, Any]:
        """Return the file and its length."""
        return {"path": str(self._path), "offset": self._path.stat().st_size}

    def _place_of(self, path: Path) -> Path:
        """Return where a file is now: in the usual folder, if that was moved with its run."""
        places = (path, self._root / path.name, self._root / path.parent.name / path.name)
        return next((place for place in places if place.exists()), path)

    def _open(self) -> AppendFile:
        """Open the file, and create its folder."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = AppendFile(self._path, keep=self._keep)
        return self._file

    def _append(self, data: bytes) -> None:
        """Append data to the open file."""
        assert self._file is not None, "start_experiment comes first"
        self._file.write(data)
