"""Tables whose rows are never evicted: what memory has no room for goes to a journal on disk, in order.

Memory and journal together are the table. Rows are written to the journal before their place in memory is used again,
so at whatever moment the process is killed each row is in one of the two.
"""

from __future__ import annotations

import itertools
import logging
import mmap
import threading
from pathlib import Path

from traceml.database.journal import Journal
from traceml.database.rings import (
    BASE,
    MAX_TAKE_BYTES,
    ByteLog,
    Ring,
    RowSlice,
    ends_of_maps,
)
from traceml.database.schema import Log, Table

__all__ = ["JournaledLog", "JournaledRing", "NameTable"]

_log = logging.getLogger("traceml")


class JournaledRing(Ring):
    """A ring that writes its oldest unstored rows to a journal before it overwrites them. Any thread appends.

    The hot path binds the attributes and inlines `append`.

    Attributes:
        lock: held while a row is appended. Re-entrant: a signal handler may log, too.
        limit: the number of the first row that may not be written before `make_room()`.
        journal: where the rows are that memory had no room for.
    """

    __slots__ = ("_making_room", "_said", "journal", "limit", "lock")

    def __init__(
        self, table: Table, buffer: mmap.mmap, offset: int, capacity: int, count: memoryview[int], slot: int,
        journals: tuple[Path, ...],
    ) -> None:  # fmt: skip
        super().__init__(table, buffer, offset, capacity, count, slot)
        self.lock = threading.RLock()
        self.limit = capacity - 1
        self.journal = Journal(*journals)
        self._said = self._making_room = False

    def append(self, *values: float) -> bool:  # type: ignore[override]
        """Append one row; False when that cannot be now, in a signal handler that interrupted `make_room`."""
        count, slot = self.count, self.slot
        with self.lock:
            while True:
                n = count[slot]
                if n >= self.limit and not self.make_room():
                    return False

                self.pack_into(self.buffer, self.offset + (n & self.mask) * self.row_bytes, *values)
                if count[slot] == n:  # else a signal handler has used the place
                    count[slot] = n + 1
                    return True

    def make_room(self) -> bool:
        """See that the next row overwrites nothing that is neither stored nor in the journal; called under `lock`.

        When the disk is full too, the oldest rows are given up after all: the sender counts them.
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
        # Readers take no row whose place comes next, as it may be half overwritten: one row less than the capacity.
        if n >= safe + self.capacity - 1:
            first = max(safe, self.oldest())
            stop = first + max(1, self.capacity // 2)
            try:
                self.journal.append(first, stop - first, self._copy(first, stop))
            except OSError as error:
                self._said = self._said or _say(self.journal.path, error)

            safe = stop

        self.limit = safe + self.capacity - 1

    def take(self, cursor: int, limit: int = 2048) -> RowSlice:
        """Return the next rows at or after `cursor`, at most `limit`, from the journal or from memory."""
        taken = super().take(cursor, limit)
        if taken.first <= cursor:
            return taken

        with self.lock:
            record = self.journal.record_of(cursor)

        if record is None or record[0] >= taken.first:
            return taken

        first, n, data = record
        start, size = max(cursor, first), self.row_bytes
        stop = min(start + limit, first + n)
        return RowSlice(start, stop - start, data[(start - first) * size : (stop - first) * size])

    def trim(self) -> None:
        """Give back the disk space of what is stored."""
        if self.journal.begin < self.journal.end:
            with self.lock:
                self.journal.trim(self.acked)


class JournaledLog(ByteLog):
    """A log that begins anew when it is full, after it has written to a journal what is not stored. Any thread appends.

    Attributes:
        journal: where the maps are that memory had no room for.
    """

    __slots__ = ("_keep", "_said", "journal")

    def __init__(
        self, log: Log, buffer: mmap.mmap, offset: int, capacity_bytes: int, count: memoryview[int], slot: int,
        journals: tuple[Path, ...], *, keep: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(log, buffer, offset, capacity_bytes, count, slot)
        self.journal = Journal(*journals, keep=keep)
        self._keep = keep
        self._said = False

    def take(self, cursor: int, limit: int = 2048) -> RowSlice:
        """Return the next maps at or after `cursor`: at most `limit`, and 256 KiB unless one alone is larger."""
        with self._lock:
            if cursor >= self.base:
                return super().take(cursor, limit)

            record = self.journal.record_of(cursor)
            if record is None or record[0] >= self.base:
                return super().take(max(cursor, self.base), limit)

        first, n, data = record
        start = max(cursor, first)
        ends = ends_of_maps(data)
        stop = min(start + limit, first + n)
        while stop > start + 1 and ends[stop - first] - ends[start - first] > MAX_TAKE_BYTES:
            stop = start + (stop - start) // 2

        return RowSlice(start, stop - start, data[ends[start - first] : ends[stop - first]])

    def trim(self) -> None:
        """Give back the disk space of what is stored."""
        if self.journal.begin < self.journal.end:
            with self._lock:
                self.journal.trim(self.acked)

    def _append(self, data: bytes, urgent: bool) -> bool:  # noqa: ARG002 - no room is kept here: there is more
        if self._ends[-1] + len(data) > self.capacity_bytes and not self._begin_anew(data):
            self.dropped += 1
            return False

        return len(data) > self.capacity_bytes or super()._append(data, urgent=True)

    def _begin_anew(self, data: bytes) -> bool:
        """Empty the memory into the journal; a map that is larger than all of it goes there too."""
        n = self.appended
        first = self.base if self._keep else max(self.base, min(self.acked, n))
        try:
            if first < n:
                self.journal.append(first, n - first, self.read(first, n))

            self.count[self.slot + BASE] = (
                n  # one store empties the memory: what was in it is whole in one place or the other
            )
            self._ends = [0]
            if len(data) > self.capacity_bytes:
                self.journal.append(n, 1, data)
                self.count[self.slot + BASE] = (
                    n + 1
                )  # before the counter: at no moment does memory seem to hold this one
                self.count[self.slot] = n + 1
        except OSError as error:
            self._said = self._said or _say(self.journal.path, error)
            return False

        return True


class NameTable:
    """Names by number, for the tables that use them; each stands in the log before any row that uses it.

    Args:
        log: the log `names`.
    """

    __slots__ = ("_ids", "_log", "_numbers")

    def __init__(self, log: JournaledLog) -> None:
        self._log = log
        self._ids: dict[str, int] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._ids)

    def id_of(self, name: str) -> int | None:
        """Return the number of a name, a new one where it has none; None when neither memory nor disk can take it."""
        known = self._ids.get(name)
        if known is not None:
            return known

        # Without a lock: two threads may give one name two numbers, and both are good.
        number = next(self._numbers)
        if not self._log.append({"id": number, "name": name}, urgent=True):
            return None

        return self._ids.setdefault(name, number)


def _say(path: Path, error: OSError) -> bool:
    _log.warning(
        "the journal %s cannot be written (%s): what is logged while no aggregator takes it is lost from now on, and "
        "counted. Free some space there, or start the aggregator again.",
        path, error.strerror or error,
    )  # fmt: skip
    return True
