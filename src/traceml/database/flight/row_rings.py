"""Bounded tables of one rank in its mapped flight file: rings of rows, and logs of maps.

Each has an append counter in the header page. A row is written first and counted afterwards, by one aligned 8-byte
store: whenever the process is killed, every row below the counter is complete.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgpack

from traceml.database.schema import Log, Table
from traceml.formatting import ESCAPED

__all__ = [
    "BASE", "COUNTERS_PER_TABLE", "MAX_MAP_BYTES", "ByteLog", "Ring", "RowSlice", "map_ends", "pack_map", "stop_within",
]  # fmt: skip

# Per table in the header: appended, sent, acked, dropped, and of a log the number of the first map in memory.
COUNTERS_PER_TABLE = 8
_SENT, _ACKED, _DROPPED, BASE = 1, 2, 3, 4
# Another thread that holds the lock may wait for the GIL and for a core, with tens of them on a busy host for seconds.
_LOCK_TIMEOUT_S = 10.0
_MAX_TAKE_BYTES = 256 * 1024
MAX_MAP_BYTES = 6 << 20
"""Size of a packed map of a log: a frame of the wire has at most 8 MiB."""


class RowSlice(NamedTuple):
    """Consecutive rows copied from a ring or a log: the next ones at or after a cursor."""

    first: int  # sequence number of the first row; `first - cursor` rows before it were overwritten unsent
    n: int
    data: bytes


class _CountedTable:
    """A table's name and its counters in the header page."""

    __slots__ = ("count", "name", "slot")

    def __init__(self, name: str, count: memoryview[int], slot: int) -> None:
        self.name, self.count, self.slot = name, count, slot

    @property
    def appended(self) -> int:
        """Rows appended so far: the sequence number of the next one."""
        return self.count[self.slot]

    @property
    def sent(self) -> int:
        """Rows below this number were sent; the recorder updates it."""
        return self.count[self.slot + _SENT]

    @sent.setter
    def sent(self, seq: int) -> None:
        self.count[self.slot + _SENT] = seq

    @property
    def acked(self) -> int:
        """Rows below this number are durable in the store; the recorder updates it."""
        return self.count[self.slot + _ACKED]

    @acked.setter
    def acked(self, seq: int) -> None:
        self.count[self.slot + _ACKED] = seq

    @property
    def dropped(self) -> int:
        """Rows refused by a full log, or overwritten unsent in a ring (updated by the recorder)."""
        return self.count[self.slot + _DROPPED]

    @dropped.setter
    def dropped(self, rows: int) -> None:
        self.count[self.slot + _DROPPED] = rows


class Ring(_CountedTable):
    """One packed table's last `capacity` rows. One thread appends; any thread reads.

    The hot path binds the attributes and inlines `append`:
    `pack_into(buffer, offset + (n & mask) * row_bytes, *values); count[slot] = n + 1`.

    Attributes:
        pack_into: the bound `pack_into` of the row's struct.
        buffer: the whole mapping. (The mmap itself: `pack_into` a memoryview of it costs 25 ns more.)
        offset: where slot 0 starts in `buffer`, in bytes.
        mask: `capacity - 1`; capacity is a power of two.
        count: the header page as int64; `count[slot]` is the append counter.
    """

    __slots__ = ("_table", "buffer", "capacity", "mask", "offset", "pack_into", "row_bytes")

    def __init__(
        self, table: Table, buffer: mmap.mmap, offset: int, capacity: int, count: memoryview[int], slot: int
    ) -> None:
        super().__init__(table.name, count, slot)
        self._table = table
        self.pack_into = table.struct.pack_into
        self.row_bytes = table.row_bytes
        self.buffer, self.offset, self.capacity, self.mask = buffer, offset, capacity, capacity - 1

    def __repr__(self) -> str:
        return f"Ring({self.name!r}, capacity={self.capacity}, appended={self.appended})"

    def append(self, *values: float) -> None:
        """Append one row: the row first, the counter afterwards."""
        n = self.count[self.slot]
        self.pack_into(self.buffer, self.offset + (n & self.mask) * self.row_bytes, *values)
        self.count[self.slot] = n + 1

    def appender(self, *columns: str) -> Callable[..., None]:
        """Return an `append` that takes the values of some columns, in the table's order, and writes 0 to the others.

        Raises:
            ValueError: a column does not exist, or comes in another order.
        """
        pack_into, buffer, offset = self._table.partial_struct(*columns).pack_into, self.buffer, self.offset
        count, slot, mask, row_bytes = self.count, self.slot, self.mask, self.row_bytes

        def append(*values: float) -> None:
            n = count[slot]
            pack_into(buffer, offset + (n & mask) * row_bytes, *values)
            count[slot] = n + 1

        return append

    def oldest(self) -> int:
        """Return the sequence number of the oldest row that is certainly complete.

        Once the ring has wrapped, the slot of the next row may already be half overwritten: `capacity - 1` rows can
        be read.
        """
        return max(0, self.appended - self.capacity + 1)

    def read_from(self, cursor: int, limit: int = 2048) -> RowSlice:
        """Return at most `limit` rows at or after `cursor`; overwritten rows are skipped, none is torn."""
        appended = self.appended
        first = max(cursor, self.oldest())
        stop = min(first + limit, appended)
        if stop <= first:
            return RowSlice(min(first, max(cursor, appended)), 0, b"")

        data = self._copy(first, stop)
        # The writer continued during the copy: drop the rows it may have touched.
        whole = min(max(first, self.oldest()), stop)
        return RowSlice(whole, stop - whole, data[(whole - first) * self.row_bytes :])

    def release(self, start: int, stop: int) -> None:
        """Drop the pages of rows [start, stop) from this process's resident memory until they are touched again.

        Nothing is lost: the pages stay in the file, or in shared memory where there is none.
        """
        row, at = self.row_bytes, self.offset
        a, b = start & self.mask, stop & self.mask
        spans = ((a, b),) if a < b else ((a, self.capacity), (0, b))
        for first, last in spans:
            begin = -(-(at + first * row) // mmap.PAGESIZE) * mmap.PAGESIZE
            length = (at + last * row) // mmap.PAGESIZE * mmap.PAGESIZE - begin
            if length > 0:
                self.buffer.madvise(mmap.MADV_DONTNEED, begin, length)

    def _copy(self, start: int, stop: int) -> bytes:
        # A slice is copied in one call under the GIL; sending from the map directly would release the GIL in mid-row.
        row, at, mask = self.row_bytes, self.offset, self.mask
        a, b = start & mask, stop & mask
        if start == stop:
            return b""

        if a < b:
            return self.buffer[at + a * row : at + b * row]

        return self.buffer[at + a * row : at + self.capacity * row] + self.buffer[at : at + b * row]


class ByteLog(_CountedTable):
    """Maps of one log, packed by msgpack. A full log starts empty when all its maps are stored; else it refuses and
    counts further maps.

    Any thread appends. The last eighth is reserved for `urgent` maps (why the process ends).
    """

    __slots__ = ("_buffer", "_ends", "_lock", "_offset", "capacity_bytes")

    def __init__(
        self, log: Log, buffer: mmap.mmap, offset: int, capacity_bytes: int, count: memoryview[int], slot: int
    ) -> None:
        super().__init__(log.name, count, slot)
        self.capacity_bytes = capacity_bytes
        self._buffer, self._offset = buffer, offset
        self._lock = threading.RLock()
        self._ends = [0]  # _ends[i]: start of map number base + i

    def __repr__(self) -> str:
        room = f"{self._ends[-1]} of {self.capacity_bytes} bytes"
        return f"{type(self).__name__}({self.name!r}, {room}, appended={self.appended})"

    @property
    def base(self) -> int:
        """Number of the first map in memory; 0 until the log has started empty again."""
        return self.count[self.slot + BASE]

    @property
    def unstored_bytes(self) -> int:
        """Bytes of the maps in memory that are not stored yet."""
        with self._lock:
            first = min(max(self.acked - self.base, 0), len(self._ends) - 1)
            return self._ends[-1] - self._ends[first]

    def append(self, row: dict[str, Any], *, urgent: bool = False) -> bool:
        """Append one map. Returns False, and counts it in `dropped`, when there is no room, or it is too large to send.

        Args:
            row: the map; values that msgpack cannot hold are written as their `repr`.
            urgent: may use the last eighth of the log.
        """
        data = pack_map(row)
        if len(data) > MAX_MAP_BYTES or not self._acquire():
            self.dropped += 1
            return False

        try:
            return self._append(data, urgent)
        finally:
            self._lock.release()

    def _acquire(self) -> bool:
        """Take the lock. A signal handler does not get it that interrupted the thread that holds it."""
        return not self._lock._is_owned() and self._lock.acquire(timeout=_LOCK_TIMEOUT_S)  # type: ignore[attr-defined]

    def _append(self, data: bytes, urgent: bool) -> bool:
        room = self.capacity_bytes - (0 if urgent else self.capacity_bytes // 8)
        if self._ends[-1] + len(data) > room and self.acked >= self.appended:
            self._start_empty()

        start = self._ends[-1]
        end = start + len(data)
        if end > room:
            self.dropped += 1
            return False

        self._buffer[self._offset + start : self._offset + end] = data
        self._ends.append(end)
        self.count[self.slot] = self.base + len(self._ends) - 1
        return True

    def _start_empty(self) -> None:
        """Drop all maps from memory. One store does it: a reader of the file finds all of them, or none."""
        self.count[self.slot + BASE] = self.appended
        self._ends = [0]

    def read(self, start: int, stop: int) -> bytes:
        """Return a copy of maps [start, stop), one after another.

        Raises:
            IndexError: some of them are not in memory.
        """
        base = self.base
        if not base <= start <= stop <= self.appended:
            raise IndexError(f"{self.name}: maps [{start}, {stop}) asked for, there are [{base}, {self.appended})")

        return self._buffer[self._offset + self._ends[start - base] : self._offset + self._ends[stop - base]]

    def read_from(self, cursor: int, limit: int = 2048) -> RowSlice:
        """Return the maps at or after `cursor`: at most `limit`, and at most 256 KiB unless one alone is larger."""
        with self._lock:
            return self._read_from(cursor, limit)

    def _read_from(self, cursor: int, limit: int) -> RowSlice:
        base, ends = self.base, self._ends
        cursor = max(cursor, base)  # earlier ones were stored before they left memory
        stop = stop_within(ends, base, cursor, min(cursor + limit, self.appended))
        if stop <= cursor:
            return RowSlice(cursor, 0, b"")

        return RowSlice(cursor, stop - cursor, self.read(cursor, stop))


def stop_within(ends: Sequence[int], base: int, start: int, stop: int) -> int:
    """Return the end of a slice of maps that has at most 256 KiB, or of the first map alone.

    Args:
        ends: where each map starts, and where the last one ends, as `map_ends` returns them.
        base: sequence number of the map at `ends[0]`.
    """
    while stop > start + 1 and ends[stop - base] - ends[start - base] > _MAX_TAKE_BYTES:
        stop = start + (stop - start) // 2

    return stop


def pack_map(fields: dict[str, Any]) -> bytes:
    """Pack a map with any values: telemetry must not raise because of a user's value."""
    try:
        # File names and arguments may hold surrogates, which are not valid text.
        packed: bytes = msgpack.packb(fields, default=repr, unicode_errors=ESCAPED)
    except (OverflowError, TypeError, ValueError):  # an integer of more than 64 bits, or nested too deep
        packed = msgpack.packb({str(key): repr(value) for key, value in fields.items()}, unicode_errors=ESCAPED)

    return packed


def map_ends(data: bytes) -> list[int]:
    """Return the offset of each map in a log's data, and the end of the last one."""
    unpacker = msgpack.Unpacker(max_buffer_size=max(len(data), 1))
    unpacker.feed(data)
    ends = [0]
    while ends[-1] < len(data):
        unpacker.skip()
        ends.append(unpacker.tell())

    return ends
