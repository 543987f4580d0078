"""Files of events that several processes may append to, and that stay readable when a writer is killed.

A block of events is written at once, under a lock on the file. A block that did not fit (a full disk) is removed, so
that the file contains complete blocks only.
"""

from __future__ import annotations

import fcntl
import os
import socket
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from traceml.errors import UsageError

__all__ = ["SUFFIXES", "GzipArraySink", "expand_path", "sink_of"]

_GZIP = 31  # zlib's wbits for a gzip member
_CLOSED = b"\n]\n"


class LineSink:
    """A file of events, open for appending: a JSON object per line, plain."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def write(self, lines: bytes) -> int:
        """Append a block, a JSON object per line; return its size in the file."""
        data = self._packed(lines)
        with self._locked() as size:
            return self._put(data, size)

    def close(self) -> None:
        """Finish the file."""
        os.close(self._fd)

    def _packed(self, lines: bytes) -> bytes:
        return lines

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Lock the file against other processes; yields its size, to which it is truncated if the block fails."""
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            size = os.fstat(self._fd).st_size
            try:
                yield size
            except OSError:
                os.ftruncate(self._fd, size)
                raise
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _put(self, data: bytes, at: int) -> int:
        """Write all data at a position; return its size."""
        rest = memoryview(data)
        while rest:
            written = os.pwrite(self._fd, rest, at)
            rest, at = rest[written:], at + written

        return len(data)


class GzipLineSink(LineSink):
    """A JSON object per line, each block a separate gzip member."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._compress = compressor()

    def _packed(self, lines: bytes) -> bytes:
        return self._compress(lines)


class ArraySink(LineSink):
    """A JSON array, closed after each block: any JSON parser can read it at any time."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with self._locked() as size:
            if size == 0:
                self._put(b"[" + _CLOSED, 0)

    def write(self, lines: bytes) -> int:
        """Append a block."""
        with self._locked() as size:
            end = os.pread(self._fd, 4, max(size - 4, 0))
            is_closed = end.endswith(_CLOSED)
            opening = b"\n" if end == b"[" + _CLOSED else b",\n"
            at = size - len(_CLOSED) if is_closed else size
            try:
                return self._put(opening + _elements(lines) + _CLOSED, at)
            except OSError:
                # Restore the closing bracket: truncation to the old size would keep the bytes written over it.
                os.ftruncate(self._fd, at)
                os.pwrite(self._fd, _CLOSED, at)
                raise


class GzipArraySink(GzipLineSink):
    """A JSON array whose blocks are gzip members; closed at the end by the process that began it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._opening = b"[\n"

    def write(self, lines: bytes) -> int:
        """Append a block."""
        written = super().write(self._opening + _elements(lines))
        self._opening = b",\n"
        return written

    def close(self) -> None:
        """Write the closing bracket."""
        try:
            super().write(b"[\n]\n" if self._opening == b"[\n" else _CLOSED)
        finally:
            super().close()


SUFFIXES: dict[str, type[LineSink]] = {
    ".pfw": LineSink,
    ".pfw.gz": GzipLineSink,
    ".json": ArraySink,
    ".json.gz": GzipArraySink,
}
"""Sink by suffix."""


def sink_of(path: Path) -> type[LineSink]:
    """Return what appends events to a file: its suffix selects the format.

    Raises:
        UsageError: its suffix is not a known format.
    """
    for suffix, sink in sorted(SUFFIXES.items(), key=lambda item: -len(item[0])):
        if path.name.endswith(suffix):
            return sink

    raise UsageError(f"{path}: the name of a trace ends in one of {', '.join(SUFFIXES)}")


def expand_path(path: str | os.PathLike[str]) -> Path:
    """Return a path with `{pid}`, `{host}` and `{rank}` replaced.

    Raises:
        UsageError: the path has no file name.
    """
    known = {"pid": os.getpid(), "host": socket.gethostname(), "rank": os.environ.get("RANK", "0")}
    text = os.fspath(path)
    for name, value in known.items():
        text = text.replace("{" + name + "}", str(value))

    if not Path(text).name:
        raise UsageError(f"a trace needs a file name, not {os.fspath(path)!r}")

    return Path(text)


def compressor() -> Callable[[bytes], bytes]:
    """Return the fastest available function that compresses bytes to a gzip member."""
    try:
        from isal import isal_zlib
    except ImportError:  # not available for this processor
        return lambda data: zlib.compress(data, 1, _GZIP)

    return lambda data: bytes(isal_zlib.compress(data, 1, _GZIP))


def _elements(lines: bytes) -> bytes:
    """Return lines as elements of an array; the only line feeds are those between objects."""
    return lines.rstrip(b"\n").replace(b"\n", b",\n")
