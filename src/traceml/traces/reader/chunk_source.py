"""The bytes of a trace, in chunks of text that threads take one after another and load side by side.

A gzip file of many members (as dftracer and our writer make them) is taken a few members at a time. Where members
begin is found by their magic number and first bytes: as these may occur by chance too, each chunk says where its last
member really ended, and the next counts only if it began there. A file that is one large member is inflated in one go.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from traceml.traces.reader.buffers import TextBuffer
from traceml.traces.reader.columns import FileDamage
from traceml.traces.reader.salvage import MAGIC, new_inflater, next_member, read_at, salvaged
from traceml.traces.reader.trace_files import GZIP_MAGIC

__all__ = ["CHUNK_BYTES", "Chunk", "ChunkSource", "GzipChunks", "Inflater", "PlainChunks", "open_source"]

CHUNK_BYTES = 4 * 1024 * 1024  # of text, about: what one thread works on at a time
_MEMBERS_BYTES = 512 * 1024  # compressed: members are taken together until they have this much
_MAX_MEMBERS_BYTES = 1024 * 1024  # compressed: a first member that is longer is inflated in one go
_MAX_TEXT_BYTES = 32 * 1024 * 1024  # that members taken together may inflate to; more comes in parts
_FED_BYTES = 64 * 1024
_PART_BYTES = 512 * 1024  # of text, had from the decompressor at a time


@dataclass(slots=True)
class Chunk:
    """A part of a file.

    Args:
        text: its text; until the next chunk is loaded into the same buffer.
        begin: where it begins in the file as it is on disk.
        end: where the next one has to begin.
        stop: where it was meant to end; the next one was taken to begin there.
        damage: what could not be inflated; offsets in the file.
        too_long: it inflates to more than may be held, the text is only its beginning: take it in parts.
    """

    text: memoryview
    begin: int
    end: int
    stop: int
    damage: list[FileDamage] = field(default_factory=list)
    too_long: bool = False


class ChunkSource(Protocol):
    """A file as chunks. `take` is called under a lock, what it returns is not."""

    def take(self, buffer: TextBuffer | None = None) -> Callable[[], Chunk] | None:
        """Return what loads the next chunk, into memory of its own without a buffer; None when there is none."""
        ...

    def parts(self, begin: int, stop: int, buffer: TextBuffer) -> Iterator[Chunk]:
        """Load what lies in a range, in chunks that can be held."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


def open_source(path: Path, begin: int = 0, end: int | None = None) -> ChunkSource:
    """Open a file.

    Args:
        path: the file; its content tells whether it is compressed.
        begin: first byte to read.
        end: the byte behind the last one; None for the end of the file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    size = os.fstat(descriptor).st_size
    compressed = os.pread(descriptor, 2, 0) == GZIP_MAGIC
    kind = GzipChunks if compressed else PlainChunks
    return kind(descriptor, begin, size if end is None else min(end, size), size)


class PlainChunks:
    """A file of plain text.

    Args:
        descriptor: the open file; closed with the source.
        begin, end: the range to read.
        size: the size of the file.
    """

    def __init__(self, descriptor: int, begin: int, end: int, size: int) -> None:
        self._descriptor, self._next, self._end, self._size = descriptor, begin, end, size

    def take(self, buffer: TextBuffer | None = None) -> Callable[[], Chunk] | None:
        """Return what loads the next chunk, into memory of its own without a buffer; None when there is none."""
        if self._next >= self._end:
            return None

        memory = buffer or TextBuffer()
        begin, self._next = self._next, min(self._next + CHUNK_BYTES, self._end)
        stop = self._next
        return lambda: self._load(begin, stop, memory)

    def parts(self, begin: int, stop: int, buffer: TextBuffer) -> Iterator[Chunk]:
        """Load what lies in a range, in chunks that can be held."""
        stop = min(stop, self._size)
        for at in range(begin, stop, CHUNK_BYTES):
            yield self._load(at, min(at + CHUNK_BYTES, stop), buffer)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _load(self, begin: int, stop: int, buffer: TextBuffer) -> Chunk:
        buffer.clear()
        size = os.preadv(self._descriptor, [buffer.room(stop - begin)], begin)
        return Chunk(buffer.text(stop - begin - size), begin, stop, stop)


class GzipChunks:
    """A gzip file of one member or many.

    Args:
        descriptor: the open file; closed with the source.
        begin, end: the range to read: members that begin in it.
        size: the size of the file.
    """

    def __init__(self, descriptor: int, begin: int, end: int, size: int) -> None:
        self._descriptor, self._begin, self._next, self._end, self._size = descriptor, begin, begin, end, size
        self._stream: Inflater | None = None

    def take(self, buffer: TextBuffer | None = None) -> Callable[[], Chunk] | None:
        """Return what loads the next chunk, into memory of its own without a buffer; None when there is none."""
        memory = buffer or TextBuffer()
        if self._stream is not None:
            chunk = self._stream.read(self._end, memory)
            return None if chunk is None else lambda: chunk

        if self._next >= self._end:
            return None

        begin = self._next
        self._next = next_member(self._descriptor, begin + _MEMBERS_BYTES, self._end)
        stop = self._next
        if begin == self._begin and stop - begin > _MAX_MEMBERS_BYTES:
            self._stream = Inflater(self._descriptor, begin, self._size)
            return self.take(memory)

        return lambda: self._load(begin, stop, memory)

    def parts(self, begin: int, stop: int, buffer: TextBuffer) -> Iterator[Chunk]:
        """Load what lies in a range, in chunks that can be held."""
        inflater = Inflater(self._descriptor, begin, self._size)
        while (chunk := inflater.read(stop, buffer)) is not None:
            yield chunk

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _load(self, begin: int, stop: int, buffer: TextBuffer) -> Chunk:
        """Inflate the members that begin in a range."""
        chunk = Inflater(self._descriptor, begin, self._size).read(stop, buffer, _MAX_TEXT_BYTES)
        assert chunk is not None  # something begins where it begins
        chunk.too_long = chunk.end < stop
        return chunk


class Inflater:
    """Inflates members one after another; goes on after damage where the next one begins.

    Args:
        descriptor: the file.
        begin: where the first member begins.
        size: the size of the file.
    """

    def __init__(self, descriptor: int, begin: int, size: int) -> None:
        self._descriptor, self._size = descriptor, size
        self._begin = self._member = self._fed = begin  # of the chunk, of the open member, of what is not read yet
        self._open: Any = None
        self._held = b""  # read, and not inflated yet
        self._made = 0  # bytes that the open member has given
        self._damage: list[FileDamage] = []

    def read(self, stop: int, buffer: TextBuffer, limit_bytes: int = CHUNK_BYTES) -> Chunk | None:
        """Return the next chunk; None at the end.

        Args:
            stop: members that begin before it are read.
            buffer: takes the text.
            limit_bytes: of text, about: a chunk of this size may end within a member.
        """
        if self._done(stop):
            return None

        size = 0
        buffer.clear()
        while size < limit_bytes and not self._done(stop):
            part = self._more()
            buffer.add(part)
            size += len(part)

        chunk = Chunk(buffer.text(), self._begin, self._member, stop, self._damage)
        self._begin, self._damage = self._member, []
        return chunk

    def _done(self, stop: int) -> bool:
        return self._open is None and self._member >= min(stop, self._size)

    def _more(self) -> bytes:
        """Return some text; may be empty."""
        if self._open is None and not self._next_member():
            return b""

        data, self._held = self._held, b""
        if not data and self._open.needs_input:
            data = read_at(self._descriptor, self._fed, min(_FED_BYTES, self._size - self._fed))
            self._fed += len(data)

        try:
            text: bytes = self._open.decompress(data, _PART_BYTES)
        except Exception:  # noqa: BLE001 - isal and zlib have errors of their own; what it is, the salvage finds out
            return self._salvage()

        self._made += len(text)
        if self._open.eof:
            self._held = self._open.unused_data
            self._open, self._member = None, self._fed - len(self._held)
        elif not data and not text and self._open.needs_input and self._fed >= self._size:
            lost = self._size - self._member
            self._fail(FileDamage(self._member, f"the file ends within a gzip member of {lost} bytes", 0), self._size)

        return text

    def _next_member(self) -> bool:
        """Open the member at the current place; without one, go on where there is one."""
        if len(self._held) < len(MAGIC):
            self._fed = self._member
            self._held = read_at(self._descriptor, self._fed, min(_FED_BYTES, self._size - self._fed))
            self._fed += len(self._held)

        if self._held.startswith(MAGIC):
            self._open, self._made = new_inflater(), 0
            return True

        begin = self._member
        padding = not self._held.strip(b"\0") and self._fed == self._size  # tape blocks and tar end so
        goes_on = next_member(self._descriptor, begin, self._size)
        self._fail(None if padding else FileDamage(begin, "bytes that are no gzip member", goes_on - begin), goes_on)
        return False

    def _salvage(self) -> bytes:
        """Return what the open member, which is broken, has left before its damage."""
        begin = self._member
        found = salvaged(self._descriptor, begin, self._size, self._made)
        if found.whole:
            self._fail(FileDamage(begin, "a gzip member with a wrong checksum; its text was used", 0), found.end)
            return found.text

        goes_on = next_member(self._descriptor, found.end, self._size)
        self._fail(FileDamage(found.end, "a broken gzip member", goes_on - found.end), goes_on)
        return found.text + b"\n"  # no event goes on across the gap

    def _fail(self, damage: FileDamage | None, goes_on: int) -> None:
        self._damage += [damage] if damage else []
        self._open, self._held, self._member = None, b"", goes_on
