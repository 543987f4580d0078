"""Reusable memory for the text of chunks."""

from __future__ import annotations

__all__ = ["TextBuffer"]

_FIRST_BYTES = 5 * 1024 * 1024  # a chunk, and the last part of it that exceeds the limit


class TextBuffer:
    """Memory for the text of one chunk after another: fresh memory costs more than decompressing into it."""

    def __init__(self) -> None:
        self._memory = bytearray(_FIRST_BYTES)
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
            larger = bytearray(2 * self._used)
            larger[:begin] = memoryview(self._memory)[:begin]
            self._memory = larger

        return memoryview(self._memory)[begin : self._used]

    def text(self, missing_bytes: int = 0) -> memoryview:
        """Return the text; a byte 0 follows it.

        Args:
            missing_bytes: bytes of the last room that were not filled.
        """
        self._used -= missing_bytes
        self._memory[self._used] = 0
        return memoryview(self._memory)[: self._used]
