"""Reusable memory for the text of chunks."""

from __future__ import annotations

import numpy as np

__all__ = ["TextBuffer"]

_FIRST_BYTES = 5 * 1024 * 1024  # a chunk, and the last part of it that exceeds the limit


class TextBuffer:
    """Memory for the text of one chunk after another: fresh memory costs more than decompressing into it."""

    def __init__(self) -> None:
        self._memory = memoryview(b"")
        self._used = 0

    def clear(self) -> None:
        """Begin a new text."""
        self._used = 0

    def add(self, part: bytes) -> None:
        """Append to the text."""
        self.room(len(part))[:] = part

    def room(self, size: int) -> memoryview:
        """Return memory for more bytes of the text."""
        begin, self._used = self._used, self._used + size
        if self._used >= len(self._memory):  # the text before may still be in use: the old memory stays
            larger = np.empty(max(_FIRST_BYTES, 2 * self._used), np.uint8).data  # takes memory as it is used
            larger[:begin] = self._memory[:begin]
            self._memory = larger

        return self._memory[begin : self._used]

    def take_back(self, size: int) -> None:
        """Remove bytes at the end of the text: those of the last room that were not filled."""
        self._used -= size

    def text(self, missing_bytes: int = 0) -> memoryview:
        """Return the text; a byte 0 follows it.

        Args:
            missing_bytes: bytes of the last room that were not filled.
        """
        self.take_back(missing_bytes)
        self.room(1)[:] = b"\0"
        self.take_back(1)
        return self._memory[: self._used]
