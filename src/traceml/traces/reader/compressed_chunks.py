"""Text of a compressed file in chunks, whatever compressed it.

The file is a sequence of units that can be decompressed independently: members of gzip, frames of zstd. Short units are
taken a few at a time and decompressed in parallel, a long one sequentially.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from traceml.traces.reader.chunks import CHUNK_BYTES, MAX_TEXT_BYTES, Chunk, ChunkSource, TextBuffer
from traceml.traces.reader.columns import FileDamage

__all__ = ["CompressedChunks", "Inflater"]


class Inflater(ABC):
    """Decompresses units one after another; continues after damage where the next one begins."""

    def __init__(self, descriptor: int, begin: int, size: int) -> None:
        self._descriptor, self._size = descriptor, size
        self._begin = self._at = begin  # starts of the chunk, of the open unit
        self._open: Any = None  # the decompressor of the open unit
        self._damage: list[FileDamage] = []

    def read(self, stop: int, buffer: TextBuffer, limit_bytes: int) -> Chunk | None:
        """Return the next chunk; None at the end.

        Args:
            stop: units that begin before it are read.
            buffer: takes the text.
            limit_bytes: of text, about: a chunk of this size may end within a unit.
        """
        if self._done(stop):
            return None

        size = 0
        buffer.clear()
        while size < limit_bytes and not self._done(stop):
            size += self._more(buffer)

        chunk = Chunk(buffer.text(), self._begin, self._at, stop, self._damage)
        self._begin, self._damage = self._at, []
        return chunk

    def _done(self, stop: int) -> bool:
        return self._open is None and self._at >= min(stop, self._size)

    @abstractmethod
    def _more(self, buffer: TextBuffer) -> int:
        """Append text; return the number of bytes, which may be 0."""


class CompressedChunks(ChunkSource):
    """A file of one or many units. Those are read that begin in the range."""

    def __init__(self, descriptor: int, begin: int, end: int, size: int) -> None:
        super().__init__(descriptor, begin, end, size)
        self._begin = begin
        self._stream: Inflater | None = None

    def next_chunk(self, buffer: TextBuffer) -> Callable[[], Chunk] | None:
        """Return a function that loads the next chunk into a buffer; None at the end."""
        if self._stream is not None:
            chunk = self._stream.read(self._end, buffer, CHUNK_BYTES)
            return None if chunk is None else lambda: chunk

        if self._next >= self._end:
            return None

        begin, self._next = self._next, self._after_units(self._next)
        if self._next == begin:
            self._stream = self._inflater(begin)
            return self.next_chunk(buffer)

        stop = self._next
        return lambda: self._load(begin, stop, buffer)

    def parts(self, begin: int, stop: int, buffer: TextBuffer) -> Iterator[Chunk]:
        """Load a range in chunks of limited size."""
        inflater = self._inflater(begin)
        while (chunk := inflater.read(stop, buffer, CHUNK_BYTES)) is not None:
            yield chunk

    def _load(self, begin: int, stop: int, buffer: TextBuffer) -> Chunk:
        """Decompress the units that begin in a range."""
        chunk = self._inflater(begin).read(stop, buffer, MAX_TEXT_BYTES)
        assert chunk is not None  # a unit begins here
        chunk.too_long = chunk.end < stop
        return chunk

    @abstractmethod
    def _inflater(self, begin: int) -> Inflater:
        """Return what decompresses from a position on."""

    @abstractmethod
    def _after_units(self, begin: int) -> int:
        """Return the end of some short units; `begin` when the file is to be decompressed sequentially."""
