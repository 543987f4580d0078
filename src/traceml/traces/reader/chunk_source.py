"""Text of a trace in chunks, which threads take one after another and load in parallel."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from traceml.traces.reader.chunks import CHUNK_BYTES, Chunk, ChunkSource, TextBuffer
from traceml.traces.reader.compressed_chunks import CompressedChunks
from traceml.traces.reader.gzip_source import GzipChunks
from traceml.traces.reader.trace_files import GZIP_MAGIC, ZSTD_START_BYTES, is_zstd, may_be_json
from traceml.traces.reader.zstd_source import ZstdChunks

__all__ = ["PlainChunks", "open_source"]

_BY_SUFFIX: dict[str, type[CompressedChunks]] = {".gz": GzipChunks, ".zst": ZstdChunks}


def open_source(path: Path, begin: int = 0, end: int | None = None) -> ChunkSource:
    """Open a file.

    Args:
        path: the file: plain, gzip or zstd.
        end: end of the range; None for the end of the file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    size = os.fstat(descriptor).st_size
    kind = _kind_of(path, os.pread(descriptor, ZSTD_START_BYTES, 0))
    return kind(descriptor, begin, size if end is None else min(end, size), size)


def _kind_of(path: Path, start: bytes) -> Callable[[int, int, int, int], ChunkSource]:
    if start.startswith(GZIP_MAGIC):
        return GzipChunks

    if is_zstd(start):
        return ZstdChunks

    # A compressed file whose first bytes are lost, as by `tail -c`, has whole members behind them.
    return PlainChunks if may_be_json(start) or not start.strip() else _BY_SUFFIX.get(path.suffix, PlainChunks)


class PlainChunks(ChunkSource):
    """A file of plain text."""

    def next_chunk(self, buffer: TextBuffer) -> Callable[[], Chunk] | None:
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

    def _load(self, begin: int, stop: int, buffer: TextBuffer) -> Chunk:
        buffer.clear()
        size = os.preadv(self._descriptor, [buffer.room(stop - begin)], begin)
        return Chunk(buffer.text(stop - begin - size), begin, stop, stop)
