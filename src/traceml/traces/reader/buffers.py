"""Memory that text is read into, chunk after chunk."""

from __future__ import annotations

__all__ = ["TextBuffer"]

_FIRST_BYTES = 5 * 1024 * 1024  # a chunk, and the part of it that goes beyond


class TextBuffer:
    """Memory for text, used again for each chunk of a thread: fresh memory costs more than inflating into it."""

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
        """Return place for so many more bytes of the text."""
        begin, self._used = self._used, self._used + size
        if self._used >= len(self._memory):  # text of the chunk before may be looked at still: the old memory stays
            larger = bytearray(2 * self._used)
            larger[:begin] = memoryview(self._memory)[:begin]
            self._memory = larger

        return memoryview(self._memory)[begin : self._used]

    def text(self, missing_bytes: int = 0) -> memoryview:
        """Return the text, a byte 0 behind it.

        Args:
            missing_bytes: of the last room, which were not filled.
        """
        self._used -= missing_bytes
        self._memory[self._used] = 0
        return memoryview(self._memory)[: self._used]
