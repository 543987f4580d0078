"""Tables that never lose rows: what memory has no room for goes to a journal on disk, in order.

Memory and journal together are the table. Rows are written to the journal before their place in memory is reused, so
each row is in one of the two whenever the process is killed.
"""

from __future__ import annotations

import itertools
import logging
import mmap
import threading
from collections.abc import Callable
from pathlib import Path

from traceml.database.flight.journal import Journal
from traceml.database.flight.row_rings import BASE, ByteLog, Ring, RowSlice, map_ends, stop_within
from traceml.database.schema import Log, Table

__all__ = ["JournaledLog", "JournaledRing", "NameTable"]

_log = logging.getLogger("traceml")


class JournaledRing(Ring):
    """Ring that writes its oldest unstored rows to a journal before overwriting them. Any thread appends.

    The hot path binds the attributes and inlines `append`.

    Attributes:
        lock: held while a row is appended. Reentrant: a signal handler may log too.
        limit: number of the first row that needs `make_room()` first.
        journal: the rows that left memory.
        before_spill: called before rows are written to the journal: what they refer to goes to disk first.
    """

    __slots__ = ("_making_room", "_warned", "before_spill", "journal", "limit", "lock")

    def __init__(
        self, table: Table, buffer: mmap.mmap, offset: int, capacity: int, count: memoryview[int], slot: int,
        journal: Journal,
    ) -> None:  # fmt: skip
        super().__init__(table, buffer, offset, capacity, count, slot)
        self.lock = threading.RLock()
        self.limit = capacity - 1
        self.journal = journal
        self.before_spill: Callable[[], object] = lambda: None
        self._warned = self._making_room = False

    def append(self, *values: float) -> bool:  # type: ignore[override]
        """Append one row. Returns False in a signal handler that interrupted `make_room`: there is no room then."""
        count, slot = self.count, self.slot
        with self.lock:
            while True:
                while count[slot] >= self.limit:
                    if not self.make_room():
                        return False

                n = count[slot]  # no signal is handled from here to the row, as nothing is called
                self.pack_into(self.buffer, self.offset + (n & self.mask) * self.row_bytes, *values)
                if count[slot] == n:  # else a signal handler has used this slot
                    count[slot] = n + 1
                    return True

    def make_room(self) -> bool:
        """Write the oldest unstored rows to the journal, so that they may be overwritten; called under `lock`.

        When the disk is full too, the oldest rows are lost; the sender counts them.
        """
        if self._making_room:
            return False

        self._making_room = True
        try:
            self._spill()
        finally:
            self._making_room = False

        return True

    def _spill(self) -> None:
        n = self.appended
        safe = max(self.acked, self.journal.end)
        # Readers skip the slot that is written next, as it may be half overwritten: one row less than the capacity.
        if n >= safe + self.capacity - 1:
            first = max(safe, self.oldest())
            stop = first + max(1, self.capacity // 2)
            self.before_spill()
            try:
                self.journal.append(first, stop - first, self._copy(first, stop))
            except OSError as error:
                self._warned = self._warned or _warn(self.journal.path, error)

            safe = stop

        self.limit = safe + self.capacity - 1

    def read_from(self, cursor: int, limit: int = 2048) -> RowSlice:
        """Return at most `limit` rows at or after `cursor`, from the journal or from memory."""
        found = super().read_from(cursor, limit)
        if found.first <= cursor:
            return found

        with self.lock:
            record = self.journal.record_of(cursor)

        if record is None or record[0] >= found.first:
            return found

        first, n, data = record
        start, size = max(cursor, first), self.row_bytes
        stop = min(start + limit, first + n)
        return RowSlice(start, stop - start, data[(start - first) * size : (stop - first) * size])

    def trim(self) -> None:
        """Free the disk space of stored rows."""
        if self.journal.begin < self.journal.end:
            with self.lock:
                self.journal.trim(self.acked)


class JournaledLog(ByteLog):
    """Log that writes its unstored maps to a journal when it is full, then starts empty. Any thread appends."""

    __slots__ = ("_warned", "journal")

    def __init__(
        self, log: Log, buffer: mmap.mmap, offset: int, capacity_bytes: int, count: memoryview[int], slot: int,
        journal: Journal,
    ) -> None:  # fmt: skip
        super().__init__(log, buffer, offset, capacity_bytes, count, slot)
        self.journal = journal
        self._warned = False

    def read_from(self, cursor: int, limit: int = 2048) -> RowSlice:
        """Return the maps at or after `cursor`: at most `limit`, and at most 256 KiB unless one alone is larger."""
        with self._lock:
            if cursor >= self.base:
                return self._read_from(cursor, limit)

            record = self.journal.record_of(cursor)
            if record is None or record[0] >= self.base:
                return self._read_from(max(cursor, self.base), limit)

        first, n, data = record
        start = max(cursor, first)
        ends = map_ends(data)
        stop = stop_within(ends, first, start, min(start + limit, first + n))
        return RowSlice(start, stop - start, data[ends[start - first] : ends[stop - first]])

    def save(self) -> None:
        """Copy the maps that are only in memory to the journal, which a reboot does not empty.

        Without space on the disk, or in a signal handler that interrupted an append, they stay in memory alone.
        """
        if not self._acquire():
            return

        try:
            first, n = max(self.base, self.journal.end), self.appended
            if first < n:
                self.journal.append(first, n - first, self.read(first, n))
        except OSError as error:
            self._warned = self._warned or _warn(self.journal.path, error)
        finally:
            self._lock.release()

    def trim(self) -> None:
        """Free the disk space of stored rows."""
        if self.journal.begin < self.journal.end:
            with self._lock:
                self.journal.trim(self.acked)

    def _append(self, data: bytes, urgent: bool) -> bool:  # noqa: ARG002 - nothing is reserved: the journal has room
        if self._ends[-1] + len(data) > self.capacity_bytes and not self._restart(data):
            self.dropped += 1
            return False

        return len(data) > self.capacity_bytes or super()._append(data, urgent=True)

    def _restart(self, data: bytes) -> bool:
        """Move all maps from memory to the journal, and a map that is larger than memory too."""
        n = self.appended
        first = max(self.base, self.journal.end if self.journal.keep else min(self.acked, n))
        try:
            if first < n:
                self.journal.append(first, n - first, self.read(first, n))

            self._start_empty()  # so its maps are complete in one of the two places
            if len(data) > self.capacity_bytes:
                self.journal.append(n, 1, data)
                # Before the counter: memory never seems to hold this map.
                self.count[self.slot + BASE] = n + 1
                self.count[self.slot] = n + 1
        except OSError as error:
            self._warned = self._warned or _warn(self.journal.path, error)
            return False

        return True


class NameTable:
    """Ids of names. Each name is in the log before any row that uses its id."""

    __slots__ = ("_ids", "_log", "_next_ids")

    def __init__(self, log: JournaledLog) -> None:
        self._log = log
        self._ids: dict[str, int] = {}
        self._next_ids = itertools.count()

    def __len__(self) -> int:
        return len(self._ids)

    def id_of(self, name: str) -> int | None:
        """Return the id of a name, a new one where it has none; None when memory and disk are full."""
        known = self._ids.get(name)
        if known is not None:
            return known

        # Without a lock: two threads may give one name two ids, and both are valid.
        name_id = next(self._next_ids)
        if not self._log.append({"id": name_id, "name": name}, urgent=True):
            return None

        return self._ids.setdefault(name, name_id)


def _warn(path: Path, error: OSError) -> bool:
    _log.warning(
        "the journal %s cannot be written (%s): rows logged while no aggregator is connected are lost from now on, and "
        "counted. Free some space there, or restart the aggregator.",
        path, error.strerror or error,
    )  # fmt: skip
    return True
