"""Text of a trace in chunks, which threads take one after another and load in parallel.

A gzip file of many members (as dftracer and our writer produce) is taken a few members at a time. Members are found by
their magic number and first bytes. As these may also occur by chance, each chunk reports where its last member really
ended, and the next chunk is valid only if it begins there. A file of one large member is decompressed sequentially.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from traceml.traces.reader.buffers import TextBuffer
from traceml.traces.reader.chunks import CHUNK_BYTES, MAX_TEXT_BYTES, Chunk, ChunkSource
from traceml.traces.reader.columns import FileDamage
from traceml.traces.reader.salvage import MAGIC, new_inflater, next_member, read_at, salvaged
from traceml.traces.reader.trace_files import GZIP_MAGIC, ZSTD_START_BYTES, is_zstd
from traceml.traces.reader.zstd_source import ZstdChunks

__all__ = ["GzipChunks", "Inflater", "PlainChunks", "open_source"]

_MEMBERS_BYTES = 256 * 1024  # compressed: members are taken together until they have this much
_MAX_MEMBERS_BYTES = 1024 * 1024  # compressed: a longer first member is decompressed sequentially
_FED_BYTES = 64 * 1024
_PART_BYTES = 512 * 1024  # of text, taken from the decompressor at a time


def open_source(path: Path, begin: int = 0, end: int | None = None) -> ChunkSource:
    """Open a file.

    Args:
        path: the file: plain, gzip or zstd.
        begin: first byte to read.
        end: end of the range; None for the end of the file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    size = os.fstat(descriptor).st_size
    start = os.pread(descriptor, ZSTD_START_BYTES, 0)
    kind = GzipChunks if start.startswith(GZIP_MAGIC) else ZstdChunks if is_zstd(start) else PlainChunks
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

    def take(self, buffer: TextBuffer) -> Callable[[], Chunk] | None:
        """Return a function that loads the next chunk into a buffer; None at the end."""
        if self._next >= self._end:
            return None

        begin, self._next = self._next, min(self._next + CHUNK_BYTES, self._end)
        stop = self._next
        return lambda: self._load(begin, stop, buffer)

    def parts(self, begin: int, stop: int, buffer: TextBuffer) -> Iterator[Chunk]:
        """Load a range in chunks of limited size."""
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
    """A gzip file of one or many members.

    Args:
        descriptor: the open file; closed with the source.
        begin, end: the range to read: members that begin in it.
        size: the size of the file.
    """

    def __init__(self, descriptor: int, begin: int, end: int, size: int) -> None:
        self._descriptor, self._begin, self._next, self._end, self._size = descriptor, begin, begin, end, size
        self._stream: Inflater | None = None

    def take(self, buffer: TextBuffer) -> Callable[[], Chunk] | None:
        """Return a function that loads the next chunk into a buffer; None at the end."""
        if self._stream is not None:
            chunk = self._stream.read(self._end, buffer)
            return None if chunk is None else lambda: chunk

        if self._next >= self._end:
            return None

        begin = self._next
        self._next = next_member(self._descriptor, begin + _MEMBERS_BYTES, self._end)
        stop = self._next
        if begin == self._begin and stop - begin > _MAX_MEMBERS_BYTES:
            self._stream = Inflater(self._descriptor, begin, self._size)
            return self.take(buffer)

        return lambda: self._load(begin, stop, buffer)

    def parts(self, begin: int, stop: int, buffer: TextBuffer) -> Iterator[Chunk]:
        """Load a range in chunks of limited size."""
        inflater = Inflater(self._descriptor, begin, self._size)
        while (chunk := inflater.read(stop, buffer)) is not None:
            yield chunk

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _load(self, begin: int, stop: int, buffer: TextBuffer) -> Chunk:
        """Decompress the members that begin in a range."""
        chunk = Inflater(self._descriptor, begin, self._size).read(stop, buffer, MAX_TEXT_BYTES)
        assert chunk is not None  # a member begins here
        chunk.too_long = chunk.end < stop
        return chunk


class Inflater:
    """Decompresses members one after another; continues after damage where the next one begins.

    Args:
        descriptor: the file.
        begin: where the first member begins.
        size: the size of the file.
    """

    def __init__(self, descriptor: int, begin: int, size: int) -> None:
        self._descriptor, self._size = descriptor, size
        self._begin = self._member = self._fed = begin  # starts of the chunk, of the open member, of the unread bytes
        self._open: Any = None
        self._held = b""  # read, and not decompressed yet
        self._made = 0  # bytes of text from the open member
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
        """Return more text; may be empty."""
        if self._open is None and not self._next_member():
            return b""

        data, self._held = self._held, b""
        if not data and self._open.needs_input:
            data = read_at(self._descriptor, self._fed, min(_FED_BYTES, self._size - self._fed))
            self._fed += len(data)

        try:
            text: bytes = self._open.decompress(data, _PART_BYTES)
        except Exception:  # noqa: BLE001 - isal and zlib raise their own errors; the salvage finds the cause
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
        """Open the member at the current position; without one, continue at the next one."""
        if len(self._held) < len(MAGIC):
            self._fed = self._member
            self._held = read_at(self._descriptor, self._fed, min(_FED_BYTES, self._size - self._fed))
            self._fed += len(self._held)

        if self._held.startswith(MAGIC):
            self._open, self._made = new_inflater(), 0
            return True

        begin = self._member
        padding = not self._held.strip(b"\0") and self._fed == self._size  # as at the end of tape blocks and tar
        resume = next_member(self._descriptor, begin, self._size)
        self._fail(None if padding else FileDamage(begin, "bytes that are not a gzip member", resume - begin), resume)
        return False

    def _salvage(self) -> bytes:
        """Return the remaining text of the open, broken member before its damage."""
        begin = self._member
        found = salvaged(self._descriptor, begin, self._size, self._made)
        if found.whole:
            self._fail(FileDamage(begin, "a gzip member with a wrong checksum; its text was used", 0), found.end)
            return found.text

        resume = next_member(self._descriptor, found.end, self._size)
        self._fail(FileDamage(found.end, "a broken gzip member", resume - found.end), resume)
        return found.text + b"\n"  # no event continues across the gap

    def _fail(self, damage: FileDamage | None, resume: int) -> None:
        self._damage += [damage] if damage else []
        self._open, self._held, self._member = None, b"", resume
