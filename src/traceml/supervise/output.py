"""What a script prints, on its way past us: from its terminal or pipe to the screen, and a copy to the run's folder."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import BinaryIO

__all__ = ["OutputCopy", "PassThroughScreen"]

_MOST_BYTES = 64 << 20

_log = logging.getLogger("traceml")


class PassThroughScreen:
    """A screen that shows nothing of its own: what the script prints goes to standard output as it comes."""

    def tick(self) -> None:
        """Do nothing: there is nothing to draw."""

    def write(self, data: bytes) -> None:
        """Pass on output of the script."""
        sys.stdout.flush()
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(sys.stdout.fileno(), rest) :]

    def close(self) -> None:
        """Do nothing: standard output is not ours."""


class OutputCopy:
    """Keeps what a script prints in a file, for the page and for later; a disk that is full costs the copy alone.

    Args:
        path: the file, which is appended to.
        most_bytes: how much is kept; a script that prints without end fills no disk.
    """

    def __init__(self, path: Path, most_bytes: int = _MOST_BYTES) -> None:
        self._left_bytes = most_bytes
        self._file: BinaryIO | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            self._give_up(error)

    def write(self, data: bytes) -> None:
        """Append what there is room for."""
        if self._file is None:
            return

        if len(data) > self._left_bytes:
            data = data[: self._left_bytes] + b"\n[traceml keeps no more of this output]\n"

        self._left_bytes -= len(data)
        try:
            self._file.write(data)
        except OSError as error:
            self._give_up(error)

        if self._left_bytes < 0:
            self.close()

    def close(self) -> None:
        """Close the file; may be called again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _give_up(self, error: OSError) -> None:
        _log.warning("the script's output is not kept in the run's folder: %s", error)
        self.close()
