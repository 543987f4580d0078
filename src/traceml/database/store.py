"""The store of one run: every row once, in one SQLite file, written by one process and followed by any number.

Ranks' frames are buffered, compressed and written in one transaction per tick; what `commit` has returned is durable.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import time
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack

from traceml.database.codec import encode
from traceml.database.reader import StreamIdentity
from traceml.database.schema import NAMES, TABLES, Table
from traceml.database.store_file import open_for_writing, translate_errors
from traceml.errors import StoreError

__all__ = ["StoreStatistics", "StoreWriter", "fold"]

# Frames of one table that arrive within a tick are stored as one, up to this size.
_MERGE_ROWS = 4096
_NO_STEP = -1
_INSERT = "INSERT INTO frames (stream, tbl, seq, n, first_step, last_step, codec, data) VALUES (?,?,?,?,?,?,?,?)"
_UPSERT_STREAM = """INSERT INTO streams (id, rank, attempt, host, pid, start_ticks, recorder, facts)
    VALUES (?,?,?,?,?,?,?,?) ON CONFLICT (id) DO UPDATE SET facts = excluded.facts"""

_Key = tuple[int, str]


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """What a writer did since it was opened, and what waits."""

    rows: int
    frames: int
    commits: int
    failed_commits: int
    duplicate_rows: int
    stored_bytes: int
    buffered_bytes: int


@dataclass(slots=True)
class _Growing:
    """Consecutive rows of one (stream, table) that wait for the next commit."""

    seq: int
    n: int = 0
    parts: list[bytes] = field(default_factory=list)
    first_step: int = _NO_STEP
    last_step: int = _NO_STEP


class StoreWriter:
    """Writes a run's store. One per store: a second one, in whatever process, is refused.

    Open it after any fork.

    Args:
        path: the file; made when it is not there, continued when it is.

    Raises:
        StoreError: it cannot be made or opened; the text says why and what to do.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        with translate_errors(self.path, "create"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._unlock = weakref.finalize(self, os.close, _lock_folder(self.path))

        try:
            self._database = open_for_writing(self.path)
            self._load()
        except BaseException:
            self._unlock()
            raise

        self._growing: dict[_Key, _Growing] = {}
        self._encoded: list[tuple[Any, ...]] = []
        self._dirty_streams: set[int] = set()
        self._meta: dict[str, bytes] = {}
        self._events: list[tuple[int, str, bytes]] = []
        self._touched: set[_Key] = set()
        self._rows = self._frames = self._commits = self._failed = self._duplicates = self._stored_bytes = 0

    def __repr__(self) -> str:
        return f"StoreWriter({str(self.path)!r}, streams={len(self._streams)})"

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stream(self, identity: StreamIdentity, **facts: Any) -> int:
        """Return the id of a rank's incarnation: the same one whenever it comes back, also after a reopening.

        Args:
            identity: who it is.
            facts: what else is known of it; merged into what is stored.
        """
        known = self._ids.get(identity)
        if known is None:
            known = len(self._streams) + 1
            self._ids[identity] = known
            self._streams[known] = (identity, {})
            self._dirty_streams.add(known)

        if facts:
            self.update_stream(known, **facts)

        return known

    def update_stream(self, stream: int, **facts: Any) -> None:
        """Merge facts (state, exit, clock offset, …) into a stream's; written by the next commit.

        `appended={table: rows}` tells how many rows a rank that ended had: what is missing then counts as lost.
        """
        identity, stored = self._streams[stream]
        self._streams[stream] = (identity, stored | facts)
        self._dirty_streams.add(stream)

    def append(
        self,
        stream: int,
        table: str,
        seq: int,
        n: int,
        data: bytes | memoryview,
        first_step: int = _NO_STEP,
        last_step: int = _NO_STEP,
    ) -> int:
        """Buffer a frame for the next commit; return how many of its rows were new.

        Rows that came before are cut off; rows missing before `seq` count as lost for good, as no row goes back.

        Args:
            stream: from `stream()`.
            table: name of the table.
            seq: number of the first row.
            n: number of rows.
            data: the rows, as they came over the wire.
            first_step: training step of the first row; -1 where rows have none.
            last_step: training step of the last row.

        Raises:
            ValueError: no such stream or table, or the size does not fit the number of rows.
        """
        _validate(table, n, data)
        if stream not in self._streams:
            raise ValueError(f"no stream {stream} in {self.path}")

        key = (stream, table)
        expected = self._next.get(key, 0)
        if seq < expected:
            known = min(n, expected - seq)
            self._duplicates += known
            if known == n:
                return 0

            data, seq, n = _without_head(table, bytes(data), known), expected, n - known

        if seq > expected:
            self._lost[key] = self._lost.get(key, 0) + seq - expected

        growing = self._growing.get(key)
        if growing is None or seq != growing.seq + growing.n or growing.n + n > _MERGE_ROWS:
            growing = self._begin(key, seq)

        growing.n += n
        growing.parts.append(bytes(data))
        growing.last_step = last_step
        if growing.first_step == _NO_STEP:
            growing.first_step = first_step

        self._next[key] = seq + n
        return n

    def next_seq(self, stream: int, table: str) -> int:
        """Return the number of the row that is expected next; rows that are only buffered are counted."""
        return self._next.get((stream, table), 0)

    def lost(self, stream: int, table: str) -> int:
        """Return how many rows are missing before the one that is expected next."""
        return self._lost.get((stream, table), 0)

    def put_meta(self, key: str, value: Any) -> None:
        """Set a fact of the run, anything msgpack can hold; written by the next commit."""
        self._meta[key] = msgpack.packb(value)

    def event(self, kind: str, data: dict[str, Any]) -> None:
        """Note that something happened, now; written by the next commit."""
        self._events.append((time.time_ns(), kind, msgpack.packb(data)))

    def commit(self) -> dict[tuple[int, str], int]:
        """Write all that is buffered, in one transaction.

        Returns:
            What may be acknowledged: per (stream, table) that got rows, the number of the row expected next.

        Raises:
            StoreError: nothing was written, typically for want of space; all is kept for the next call.
        """
        for key in list(self._growing):
            self._finish(key)

        # Who follows the frames by number finds each name before the rows that use it.
        names = self._table_ids[NAMES.name]
        self._encoded.sort(key=lambda frame: frame[1] != names)
        if not (self._encoded or self._dirty_streams or self._meta or self._events):
            return {}

        try:
            with translate_errors(self.path, "write"):
                self._write()
        except StoreError:
            self._failed += 1
            raise

        self._rows += sum(frame[3] for frame in self._encoded)
        self._frames += len(self._encoded)
        self._stored_bytes += sum(len(frame[7]) for frame in self._encoded)
        self._commits += 1
        done = {key: self._next[key] for key in self._touched}
        for waiting in (self._encoded, self._dirty_streams, self._meta, self._events, self._touched):
            waiting.clear()

        return done

    def statistics(self) -> StoreStatistics:
        """Return counts since it was opened."""
        waiting = sum(len(part) for growing in self._growing.values() for part in growing.parts)
        return StoreStatistics(
            self._rows,
            self._frames,
            self._commits,
            self._failed,
            self._duplicates,
            self._stored_bytes,
            waiting + sum(len(frame[7]) for frame in self._encoded),
        )

    def close(self) -> None:
        """Commit, fold the write-ahead log into the file, and close.

        Raises:
            StoreError: the last rows could not be written; it is closed all the same.
        """
        if not self._unlock.alive:
            return

        try:
            self.commit()
            with translate_errors(self.path, "close"):
                self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                with contextlib.suppress(sqlite3.OperationalError):  # someone is reading it: then it stays as it is
                    # One file without companions: it can be copied, and read where nothing can be written.
                    self._database.execute("PRAGMA journal_mode=DELETE")
        finally:
            self._database.close()
            self._unlock()

    def _begin(self, key: _Key, seq: int) -> _Growing:
        if key in self._growing:
            self._finish(key)

        self._growing[key] = _Growing(seq)
        return self._growing[key]

    def _finish(self, key: _Key) -> None:
        growing = self._growing.pop(key)
        stream, table = key
        codec, data = encode(TABLES[table], b"".join(growing.parts))
        steps = (growing.first_step, growing.last_step)
        self._encoded.append((stream, self._table_ids[table], growing.seq, growing.n, *steps, int(codec), data))
        self._touched.add(key)

    def _write(self) -> None:
        database = self._database
        database.execute("BEGIN IMMEDIATE")
        try:
            database.executemany(_UPSERT_STREAM, [self._stream_row(stream) for stream in sorted(self._dirty_streams)])
            database.executemany(_INSERT, self._encoded)
            database.executemany("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", self._meta.items())
            database.executemany("INSERT INTO events (epoch_ns, kind, data) VALUES (?, ?, ?)", self._events)
            database.execute("COMMIT")
        except BaseException:
            # A full disk may have rolled it back already.
            if database.in_transaction:
                database.execute("ROLLBACK")

            raise

    def _stream_row(self, stream: int) -> tuple[Any, ...]:
        identity, facts = self._streams[stream]
        return (stream, *identity, msgpack.packb(facts))

    def _load(self) -> None:
        """Find out where a store that is continued stands."""
        with translate_errors(self.path, "read"):
            names: dict[int, str] = dict(self._database.execute("SELECT id, name FROM tables"))
            self._table_ids = {name: number for number, name in names.items()}
            self._streams: dict[int, tuple[StreamIdentity, dict[str, Any]]] = {}
            query = "SELECT id, rank, attempt, host, pid, start_ticks, recorder, facts FROM streams"
            for row in self._database.execute(query):
                self._streams[row[0]] = (StreamIdentity(*row[1:7]), msgpack.unpackb(row[7], strict_map_key=False))

            self._ids = {identity: number for number, (identity, _) in self._streams.items()}
            self._next: dict[_Key, int] = {}
            self._lost: dict[_Key, int] = {}
            query = "SELECT stream, tbl, max(seq + n), sum(n) FROM frames GROUP BY stream, tbl"
            for stream, number, after, stored in self._database.execute(query):
                self._next[stream, names[number]] = after
                self._lost[stream, names[number]] = after - stored


def fold(path: Path) -> None:
    """Leave a finished store as one file without companions, where readers had kept it from that when it was closed."""
    if not path.with_name(f"{path.name}-wal").exists():
        return

    with contextlib.suppress(StoreError):  # somebody writes it again, or it cannot be written: it is whole all the same
        StoreWriter(path).close()


def _lock_folder(path: Path) -> int:
    """Lock the folder of the store against a second writer; never the file: SQLite's own locks are on it."""
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StoreError(
            f"another aggregator writes the run's store {path}. End it first, or use another run."
        ) from None
    except OSError:
        pass  # a network filesystem that cannot lock folders: SQLite's locks still keep the file whole

    return descriptor


def _validate(table: str, n: int, data: bytes | memoryview) -> None:
    schema = TABLES.get(table)
    if schema is None:
        raise ValueError(f"no table {table!r}; there are {', '.join(TABLES)}")

    if n < 1 or (isinstance(schema, Table) and len(data) != n * schema.row_bytes):
        raise ValueError(f"{table}: {len(data)} bytes are not {n} rows")


def _without_head(table: str, data: bytes, rows: int) -> bytes:
    schema = TABLES[table]
    if isinstance(schema, Table):
        return data[rows * schema.row_bytes :]

    unpacker = msgpack.Unpacker()
    unpacker.feed(data)
    for _ in range(rows):
        unpacker.skip()

    return data[unpacker.tell() :]
