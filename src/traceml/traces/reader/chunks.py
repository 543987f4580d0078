"""A chunk of a trace's text, the reusable memory for it, and the interface of the files that chunks come from."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from traceml.traces.reader.columns import FileDamage

__all__ = ["CHUNK_BYTES", "GAP", "MAX_TEXT_BYTES", "Chunk", "ChunkSource", "TextBuffer"]

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


CHUNK_BYTES = 4 * 1024 * 1024  # of text, about: the work of one thread at a time
MAX_TEXT_BYTES = 32 * 1024 * 1024  # of compressed parts that are taken together; more is read in parts
GAP = b"\x1e\n"
"""Text in place of what was lost. No JSON value contains it, so that halves on its sides are not read as one event."""


@dataclass(slots=True)
class Chunk:
    """A part of a file."""

    text: memoryview  # its text; valid until the next chunk is loaded into the same buffer
    begin: int
    end: int  # where the next chunk has to begin
    stop: int  # its expected end, where the next chunk was assumed to begin
    damage: list[FileDamage] = field(default_factory=list)  # ranges that could not be decompressed; offsets in the file
    too_long: bool = False  # the text exceeds the limit and is only the beginning: read the chunk in parts


class ChunkSource(ABC):
    """A file as chunks. `next_chunk` is called under a lock, its result without one.

    Args:
        descriptor: the open file; closed with the source.
        begin, end: the range to read.
    """

    def __init__(self, descriptor: int, begin: int, end: int, size: int) -> None:
        self._descriptor, self._next, self._end, self._size = descriptor, begin, end, size

    @abstractmethod
    def next_chunk(self, buffer: TextBuffer) -> Callable[[], Chunk] | None:
        """Return a function that loads the next chunk into a buffer; None at the end."""

    @abstractmethod
    def parts(self, begin: int, stop: int, buffer: TextBuffer) -> Iterator[Chunk]:
        """Load a range in chunks of limited size."""

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)
