"""Output of a script: passed to the screen, and copied to the run's folder."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import BinaryIO

__all__ = ["OutputCopy", "PassThroughScreen"]

_MAX_BYTES = 64 << 20

_log = logging.getLogger("traceml")


class PassThroughScreen:
    """A screen without a view: the script's output goes to standard output unchanged."""

    def tick(self) -> None:
        """Do nothing."""

    def write(self, data: bytes) -> None:
        """Write output of the script."""
        sys.stdout.flush()
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(sys.stdout.fileno(), rest) :]

    def close(self) -> None:
        """Do nothing: standard output is not ours."""


class OutputCopy:
    """Copies the script's output to a file. A full disk ends the copy, not the job.

    Args:
        most_bytes: limit of the file's growth, so that endless output does not fill the disk.
    """

    def __init__(self, path: Path, most_bytes: int = _MAX_BYTES) -> None:
        self._left_bytes = most_bytes
        self._file: BinaryIO | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            self._give_up(error)

    def write(self, data: bytes) -> None:
        """Append output up to the limit."""
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
