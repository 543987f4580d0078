"""Journal: a file for logged rows that memory has no room for, until they are stored.

One file per table, next to the flight file's fallback. A record that was cut off by the end of the process or by a full
disk is recognized by its checksum and ends the file. The file is emptied when all its rows are acknowledged.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path

from traceml.database.flight.row_rings import RowSlice
from traceml.trusted_files import GuardedDescriptor, create_trusted, make_trusted_folder, open_trusted, opened_trusted

__all__ = ["JOURNAL_SUFFIX", "Journal", "journal_path", "read_journal", "write_all"]

JOURNAL_SUFFIX = ".journal"
# magic, first row, rows, bytes of data, CRC-32 of these three and the data
_RECORD = struct.Struct("<4sqqqI4x")
_MAGIC = b"TMJ2"
_NUMBERS = struct.Struct("<qqq")


def journal_path(stem: Path, table: str) -> Path:
    """Return the path of a table's journal.

    Args:
        stem: the flight file's name without its suffix, in the folder of the journals.
    """
    return stem.with_name(f"{stem.name}.{table}{JOURNAL_SUFFIX}")


class Journal:
    """Rows of one table on disk, in order. The first append creates the file.

    Not thread-safe: the lock of its table guards it.

    Args:
        places: candidate paths; the first whose folder is this user's alone and writable is used.
        keep: keep rows after they are stored, for a store that starts again.
        on_create: called with the folder of a file that was created.
    """

    def __init__(
        self, *places: Path, keep: bool = False, on_create: Callable[[Path], object] = lambda _folder: None
    ) -> None:
        self.path = places[0] if places else Path(os.devnull)
        """The file."""
        self._places = places
        self.end = 0
        """Number after the last row in the file."""
        self.keep = keep
        self._on_create = on_create
        self._own: GuardedDescriptor | None = None
        self._pid = os.getpid()
        self._size = 0
        self._firsts: list[int] = []
        self._records: list[tuple[int, int, int]] = []  # (rows, offset, bytes) of each

    def __repr__(self) -> str:
        return f"Journal({str(self.path)!r}, {len(self._records)} records, {self._size} bytes)"

    @property
    def begin(self) -> int:
        """Number of the oldest row in the file; `end` when it is empty."""
        return self._firsts[0] if self._firsts else self.end

    def append(self, first: int, n: int, data: bytes) -> None:
        """Append rows.

        Raises:
            OSError: the disk is full or not writable; nothing was appended.
        """
        own = self._own or self._open()
        own.check()
        record = _RECORD.pack(_MAGIC, first, n, len(data), _checksum(first, n, data)) + data
        try:
            write_all(own.number, record, self._size)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(own.number, self._size)

            raise

        self._records.append((n, self._size + _RECORD.size, len(data)))
        self._firsts.append(first)
        self._size += len(record)
        self.end = first + n

    def record_of(self, row: int) -> tuple[int, int, bytes] | None:
        """Return (first row, rows, data) of the record with a row, or of the next one; None without one."""
        place = max(bisect_right(self._firsts, row) - 1, 0)
        while place < len(self._records):
            first, (n, offset, size) = self._firsts[place], self._records[place]
            if first + n > row:
                return first, n, self._read(size, offset)

            place += 1

        return None

    def _read(self, size: int, offset: int) -> bytes:
        """Read a part of the file, or of a new descriptor of it where the script has closed ours."""
        try:
            assert self._own is not None
            self._own.check()
        except OSError:
            self._own = GuardedDescriptor(open_trusted(self.path, os.O_RDWR))  # its lock is lost

        return os.pread(self._own.number, size, offset)

    def _open(self) -> GuardedDescriptor:
        refused: OSError | None = None
        for path in self._places:
            try:
                make_trusted_folder(path.parent)
                self._own = GuardedDescriptor(create_trusted(path))
            except OSError as error:
                refused = refused or error
                continue

            self.path = path
            self._on_create(path.parent)
            return self._own

        raise refused or OSError(errno.ENOENT, "it has no folder", str(self.path))

    def trim(self, acked: int) -> None:
        """Empty the file when all its rows are stored."""
        if self._own is not None and self._records and acked >= self.end and not self.keep:
            with contextlib.suppress(OSError):
                self._own.check()
                os.ftruncate(self._own.number, 0)
                self._firsts.clear()
                self._records.clear()
                self._size = 0

    def close(self, *, unlink: bool) -> None:
        """Close the file.

        Args:
            unlink: remove it, as all its rows are stored.
        """
        if self._own is None:
            return

        self._own.close()
        self._own = None
        with contextlib.suppress(FileNotFoundError, PermissionError):  # a process may have given up its rights since
            if unlink and self._pid == os.getpid():
                self.path.unlink()


def read_journal(path: Path) -> Iterator[RowSlice]:
    """Yield the records of a dead writer's journal, up to the first incomplete one.

    Raises:
        OSError: it cannot be read, or is not a file of this user.
    """
    try:
        with opened_trusted(path) as descriptor:
            yield from _records(descriptor)
    except FileNotFoundError:
        return


def _records(descriptor: int) -> Iterator[RowSlice]:
    offset = 0
    while len(head := os.pread(descriptor, _RECORD.size, offset)) == _RECORD.size:
        magic, first, n, size, checksum = _RECORD.unpack(head)
        left = os.fstat(descriptor).st_size - offset - _RECORD.size
        is_known = magic == _MAGIC and 0 <= size <= left
        data = os.pread(descriptor, size, offset + _RECORD.size) if is_known else b""
        if not is_known or len(data) != size or _checksum(first, n, data) != checksum:
            return

        yield RowSlice(first, n, data)
        offset += _RECORD.size + size


def _checksum(first: int, n: int, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(_NUMBERS.pack(first, n, len(data))))


def write_all(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of the data at an offset of a file."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, memoryview(data)[done:], offset + done)
