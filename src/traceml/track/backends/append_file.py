"""File that only grows, and that a restart cuts back to its confirmed length."""

from __future__ import annotations

import os
from pathlib import Path

from traceml.errors import BackendError

__all__ = ["AppendFile", "cut_back"]


class AppendFile:
    """Appends to a file without buffering: what `write` returned from survives the death of this process.

    Args:
        path: the file.
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
    found = path.stat().st_size if path.exists() else 0
    if found < size:
        gone = "" if path.exists() else "is gone: it "
        raise BackendError(f"{path} {gone}has {found} bytes, fewer than the {size} that were delivered")

    if found:
        os.truncate(path, size)
