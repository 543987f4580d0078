"""Writer of a run's store: each row once, in one SQLite file with one writer and any number of readers.

Frames are buffered, compressed and written in one transaction per tick. Rows are durable once `commit` returns them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgpack

from traceml.database.schema import NAMES, TABLES
from traceml.database.store.frame_compression import encode
from traceml.database.store.frame_editor import THINNED
from traceml.database.store.maintenance import Maintenance
from traceml.database.store.reader import StreamIdentity
from traceml.database.store.store_file import last_written_s, open_for_writing, translate_errors
from traceml.database.store.unframed_rows import FrameBuffer, IncomingRows, UnframedRows
from traceml.errors import StoreBusyError, StoreError

__all__ = ["StoreWriter", "merge_wal"]

# Frames of one table within a tick are merged into one, up to this size.
_MERGE_ROWS = 4096
_NO_STEP = -1
_INSERT = "INSERT INTO frames (id, stream, tbl, seq, n, first_step, last_step, codec, data) VALUES (?,?,?,?,?,?,?,?,?)"
_UPSERT_STREAM = """INSERT INTO streams (id, rank, attempt, host, pid, start_ticks, recorder, facts)
    VALUES (?,?,?,?,?,?,?,?) ON CONFLICT (id) DO UPDATE SET facts = excluded.facts"""

_Key = tuple[int, str]


class StoreWriter:
    """Writes a run's store. A second writer of the same store, in any process, is refused.

    Open it after any fork.

    Args:
        path: the file; created if missing, else continued.

    Raises:
        StoreError: it cannot be created or opened; the message says why and what to do.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        with translate_errors(self.path, "create"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._unlock = weakref.finalize(self, os.close, _lock_folder(self.path))

        self._buffers: dict[_Key, FrameBuffer] = {}
        self._encoded: list[tuple[Any, ...]] = []
        self._dirty_streams: set[int] = set()
        self._meta: dict[str, bytes] = {}
        self._events: list[tuple[int, str, bytes]] = []
        self._touched: set[_Key] = set()
        self._is_large = False  # for good: rows are never stored in another order than that of their numbers
        try:
            self._database = open_for_writing(self.path)
            self._unframed = UnframedRows(self._database)
            self._load()
            with translate_errors(self.path, "read"):
                self._maintenance = Maintenance(self.path, self._database, self._table_ids)
        except BaseException:
            self._unlock()
            raise

    def __repr__(self) -> str:
        return f"StoreWriter({str(self.path)!r}, streams={len(self._streams)})"

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stream(self, identity: StreamIdentity, **facts: Any) -> int:
        """Return the id of a stream: always the same for one identity, also after the store was reopened.

        Args:
            facts: further facts, merged into the stored ones.
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
        """Merge facts (state, exit, clock offset, …) into those of a stream; the next commit writes them.

        `appended={table: rows}` is the total of a rank that ended: rows that are missing then count as lost.
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
        data: bytes,
        first_step: int = _NO_STEP,
        last_step: int = _NO_STEP,
        packed: tuple[int, bytes] | None = None,
    ) -> None:
        """Buffer a frame of new rows for the next commit.

        Rows missing before `seq` count as lost, because rows never arrive out of order.

        Args:
            seq: number of the first row, at least `next_seq`.
            first_step: training step of the first row; -1 for rows without steps.
            packed: codec and bytes that `codec.encode` has given for these rows: they are not compressed again.
        """
        key = (stream, table)
        self._next[key] = seq + n
        if self._is_large and table in THINNED:
            self._touched.add(key)
            self._unframed.add(IncomingRows(stream, table, seq, n, data, first_step, last_step))
            return

        buffer = self._buffers.get(key)
        if buffer is None or seq != buffer.seq + buffer.n or buffer.n + n > _MERGE_ROWS:
            if buffer is not None:
                self._finish(key)

            buffer = self._buffers[key] = FrameBuffer(seq)

        buffer.add(n, data, first_step, last_step, packed)

    def hold(self) -> None:
        """From now on let steps and samples wait for others of their frame, as in a large job; see `unframed_rows`."""
        self._is_large = True

    def next_seq(self, stream: int, table: str) -> int:
        """Return the number of the row that is expected next; rows that are only buffered are counted."""
        return self._next.get((stream, table), 0)

    def put_meta(self, key: str, value: Any) -> None:
        """Set a fact of the run, any msgpack value; the next commit writes it."""
        self._meta[key] = _packed(value)

    def event(self, kind: str, data: dict[str, Any]) -> None:
        """Record an event with the current time; the next commit writes it."""
        self._events.append((time.time_ns(), kind, _packed(data)))

    def commit(self, now_s: float | None = None, *, frames_of_all: bool = False) -> dict[tuple[int, str], int]:
        """Write all buffered rows in one transaction.

        In a large job, readers see steps and samples some seconds later; see `unframed_rows`.

        Args:
            frames_of_all: let readers see all rows.

        Returns:
            What to acknowledge: the number of the next expected row, per (stream, table) that got rows.

        Raises:
            StoreError: nothing was written, usually because the disk is full; all rows stay for the next call.
        """
        now_s = time.monotonic() if now_s is None else now_s
        for key in list(self._buffers):
            self._finish(key)

        for key, rows in self._unframed.drain(now_s, everything=frames_of_all):
            self._encode(key, rows)

        # A reader that follows frames by id finds each name before the rows that use it.
        names = self._table_ids[NAMES.name]
        self._encoded.sort(key=lambda frame: frame[1] != names)
        if not (self._encoded or self._dirty_streams or self._meta or self._events or self._unframed.has_work):
            return {}

        with translate_errors(self.path, "write"):
            frames = self._write()

        self._unframed.after_commit()
        for frame, stream, number, _, n, _, _, _, data in frames:
            self._maintenance.record(stream, self._table_names[number], frame, n, len(data), now_s)

        done = {key: self._next[key] for key in self._touched}
        for waiting in (self._encoded, self._dirty_streams, self._meta, self._events, self._touched):
            waiting.clear()

        self._is_large |= self._maintenance.compaction.is_merging_off
        return done

    def maintain(
        self, budget_s: float, cursors: Sequence[int] = (), limit_bytes: int | None = None, now_s: float | None = None
    ) -> bool:
        """Sum rows, merge small frames and thin old rows for a while; return whether something is left to do.

        Args:
            budget_s: seconds after which nothing further is begun; a transaction takes a few milliseconds.
            cursors: id of the last frame that each delivery has read; what they have not read stays, for a while.
            limit_bytes: most bytes that steps and samples take: beyond them, old ones are thinned. None keeps all.

        Raises:
            StoreError: nothing was written by the last transaction; rows are complete and in order.
        """
        with translate_errors(self.path, "write"):
            return self._maintenance.run(budget_s, time.monotonic() if now_s is None else now_s, cursors, limit_bytes)

    def close(self) -> None:
        """Commit, merge the write-ahead log into the file, and close.

        Raises:
            StoreError: the last rows could not be written; the file is closed anyway.
        """
        if not self._unlock.alive:
            return

        try:
            self.commit(frames_of_all=True)
            with translate_errors(self.path, "close"):
                self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                with contextlib.suppress(sqlite3.OperationalError):  # a reader has it open: the log stays
                    # A single file can be copied, and read from read-only media.
                    self._database.execute("PRAGMA journal_mode=DELETE")
        finally:
            self._database.close()
            self._unlock()

    def _finish(self, key: _Key) -> None:
        self._encode(key, self._buffers.pop(key))
        self._touched.add(key)

    def _encode(self, key: _Key, rows: FrameBuffer) -> None:
        stream, table = key
        codec, data = rows.packed or encode(TABLES[table], b"".join(rows.parts))
        steps = (rows.first_step, rows.last_step)
        self._encoded.append((stream, self._table_ids[table], rows.seq, rows.n, *steps, int(codec), data))

    def _write(self) -> list[tuple[Any, ...]]:
        """Write all that waits; return the frames with their ids."""
        database = self._database
        frames = [(number, *frame) for number, frame in enumerate(self._encoded, self._next_id)]
        database.execute("BEGIN IMMEDIATE")
        try:
            streams = ((stream, *self._streams[stream]) for stream in sorted(self._dirty_streams))
            database.executemany(_UPSERT_STREAM, [(stream, *who, _packed(facts)) for stream, who, facts in streams])
            database.executemany(_INSERT, frames)
            self._unframed.write()
            database.executemany("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", self._meta.items())
            database.executemany("INSERT INTO events (epoch_ns, kind, data) VALUES (?, ?, ?)", self._events)
            database.execute("COMMIT")
        except BaseException:
            # A full disk may already have rolled it back.
            if database.in_transaction:
                database.execute("ROLLBACK")

            raise

        self._next_id += len(frames)
        return frames

    def _load(self) -> None:
        """Load the streams and positions of a store that is continued."""
        with translate_errors(self.path, "read"):
            names: dict[int, str] = dict(self._database.execute("SELECT id, name FROM tables"))
            self._table_names = names
            self._table_ids = {name: number for number, name in names.items()}
            self._next_id = 1 + self._database.execute("SELECT coalesce(max(id), 0) FROM frames").fetchone()[0]
            self._streams: dict[int, tuple[StreamIdentity, dict[str, Any]]] = {}
            query = "SELECT id, rank, attempt, host, pid, start_ticks, recorder, facts FROM streams"
            for row in self._database.execute(query):
                self._streams[row[0]] = (StreamIdentity(*row[1:7]), self._unpacked_facts(row[0], row[7]))

            self._ids = {identity: number for number, (identity, _) in self._streams.items()}
            self._next: dict[_Key, int] = {}
            query = (
                "SELECT stream, tbl, max(seq + n + coalesce(thinned, 0)) FROM frames "
                "LEFT JOIN thinnings ON thinnings.id = frames.id GROUP BY stream, tbl"
            )
            for stream, number, after in self._database.execute(query):
                self._next[stream, names[number]] = after

            query = "SELECT stream, tbl, next_seq FROM emptied"
            for stream, number, after in self._database.execute(query):
                key = (stream, names[number])
                self._next[key] = max(self._next.get(key, 0), after)

            self._load_unframed()

    def _unpacked_facts(self, stream: int, data: bytes) -> dict[str, Any]:
        facts: Any = None
        with contextlib.suppress(ValueError, TypeError, msgpack.UnpackException):
            facts = msgpack.unpackb(data, strict_map_key=False)

        if not isinstance(facts, dict):
            raise StoreError(f"the run's store {self.path} is damaged: the facts of stream {stream} cannot be read. "
                             "Move it away, or start a new run.")  # fmt: skip

        return facts

    def _load_unframed(self) -> None:
        """Hold the rows that an earlier writer has not written as frames."""
        for stored in self._unframed.stored():
            self._is_large = True
            key = (stored.stream, stored.table)
            if stored.seq >= self._next.get(key, 0):  # else it is in a frame
                self._unframed.add(stored, is_stored=True)
                self._next[key] = stored.seq + stored.n


def merge_wal(path: Path) -> None:
    """Merge the write-ahead log of a finished store that readers had open when it was closed.

    Also undo a transaction in which a writer without such a log was killed.
    """
    if not path.with_name(f"{path.name}-wal").exists() and not _has_open_journal(path):
        return

    written_s = last_written_s(path)
    with contextlib.suppress(StoreError, OSError):  # it has a writer again, or is read-only: it is complete anyway
        StoreWriter(path).close()
        if written_s is not None:
            os.utime(path, (written_s, written_s))  # it tells when a run ended that nobody has ended


def _has_open_journal(path: Path) -> bool:
    """Whether there is a rollback journal that is not ended: an ended one is empty, or begins with zeros."""
    with contextlib.suppress(OSError), path.with_name(f"{path.name}-journal").open("rb") as file:
        return any(file.read(8))

    return False


def _lock_folder(path: Path) -> int:
    """Lock the store against a second writer by its folder. The file itself carries SQLite's locks."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    if _has_locked(folder, path):
        return folder

    # NFS: it locks only what is open for writing, and SQLite's locks are free between transactions.
    os.close(folder)
    file = os.open(path.with_name(f"{path.name}-lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    _has_locked(file, path)  # else the filesystem has no locks at all
    return file


def _has_locked(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StoreBusyError(
            f"another aggregator is writing the run's store {path}. Stop it first, or use another run."
        ) from None
    except OSError:
        return False

    return True


def _packed(value: Any) -> bytes:
    """Return a value as msgpack; what is not UTF-8 in the name of a file is written as an escape sequence."""
    return bytes(msgpack.packb(value, unicode_errors="backslashreplace"))
