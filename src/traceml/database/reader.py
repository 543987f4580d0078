"""Reader of a run's store, also while it is being written. Frames and events are followed by cursor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np
from numpy.typing import NDArray

from traceml.database.codec import decode
from traceml.database.store_file import open_for_reading, translate_errors
from traceml.errors import StoreError

__all__ = ["Frame", "RunEvent", "StoreReader", "StreamIdentity", "StreamRecord"]

# A read transaction ends with each batch, so a slow reader never keeps the writer from reusing its log.
_BATCH = 256
_META_BATCH = 8192


class StreamIdentity(NamedTuple):
    """One process of a rank. Its rows are numbered from 0 in each table.

    `recorder` distinguishes consecutive recorders of one process; "" where there is only one.
    """

    rank: int
    attempt: int
    host: str
    pid: int
    start_ticks: int
    recorder: str = ""


@dataclass(frozen=True, slots=True)
class StreamRecord:
    """A stored stream.

    Attributes:
        id: its number in this store.
        identity: its rank and process.
        facts: facts from the aggregator: world size, local rank, clock, state, exit, …
    """

    id: int
    identity: StreamIdentity
    facts: dict[str, Any]

    @property
    def rank(self) -> int:
        """The rank."""
        return self.identity.rank

    @property
    def attempt(self) -> int:
        """Number of restarts of the job so far."""
        return self.identity.attempt

    @property
    def host(self) -> str:
        """The host's name."""
        return self.identity.host

    @property
    def state(self) -> str:
        """The last state from the aggregator; `running` before any."""
        return str(self.facts.get("state", "running"))


@dataclass(frozen=True, slots=True)
class RunEvent:
    """An event of the run; `id` is the cursor."""

    id: int
    epoch_ns: int
    kind: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Frame:
    """Consecutive rows of one table of a stream; `id` is the cursor."""

    id: int
    stream: int
    table: str
    seq: int
    n: int
    first_step: int
    last_step: int
    data: bytes

    def maps(self) -> list[dict[str, Any]]:
        """Return a log's rows.

        Raises:
            StoreError: the bytes are damaged.
        """
        unpacker = msgpack.Unpacker(strict_map_key=False, max_buffer_size=0)
        unpacker.feed(self.data)
        try:
            rows = list(unpacker)
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise StoreError(f"frame {self.id} of {self.table} is damaged: {error}") from error

        if not all(isinstance(row, dict) for row in rows):
            raise StoreError(f"frame {self.id} of {self.table} is damaged: it holds values that are not maps")

        return rows


@dataclass(slots=True)
class _Progress:
    """Progress of a (stream, table): number of stored rows, and the number of the next row."""

    stored: int = 0
    next_seq: int = 0


class StoreReader:
    """Reads a run's store. One thread at a time; open it after any fork.

    Args:
        path: the file.
        on_damage: called with a message for each damaged frame, which is then skipped; without it, they raise.

    Raises:
        StoreError: the store is missing, damaged, or has another version. All methods may raise it.
    """

    def __init__(self, path: Path, on_damage: Callable[[str], None] | None = None) -> None:
        self.path = Path(path)
        self._on_damage = on_damage
        self._database = open_for_reading(self.path)
        with translate_errors(self.path, "read"):
            rows = self._database.execute("SELECT id, name, layout FROM tables").fetchall()

        self._ids: dict[str, int] = {name: number for number, name, _ in rows}
        self._names: dict[int, str] = {number: name for number, name, _ in rows}
        try:
            self._dtypes = {name: _dtype(msgpack.unpackb(layout)) for _, name, layout in rows}
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            self._database.close()
            raise self._damaged(f"the layout of a table: {error}") from error

        self._progress: dict[tuple[str, int], _Progress] = {}
        self._progress_after = 0

    def __repr__(self) -> str:
        return f"StoreReader({str(self.path)!r})"

    def __enter__(self) -> StoreReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def tables(self) -> list[str]:
        """Names of the tables and logs."""
        return list(self._ids)

    def dtype(self, table: str) -> np.dtype[Any] | None:
        """Return a packed table's layout in this store, which may be an older version's; None for a log."""
        self._id(table)
        return self._dtypes[table]

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def meta(self) -> dict[str, Any]:
        """Return the facts of the run."""
        return {
            key: self._unpacked(value, f"the fact {key!r}") for key, value in self._fetch("SELECT key, value FROM meta")
        }

    def streams(self) -> list[StreamRecord]:
        """Return all streams, in order of first appearance."""
        rows = self._fetch("SELECT id, rank, attempt, host, pid, start_ticks, recorder, facts FROM streams ORDER BY id")
        return [StreamRecord(row[0], StreamIdentity(*row[1:7]), self._map(row[7], f"stream {row[0]}")) for row in rows]

    def events(self, after: int = 0, kind: str | None = None) -> list[RunEvent]:
        """Return the events after a cursor (the id of the last one seen), optionally of one kind."""
        query = "SELECT id, epoch_ns, kind, data FROM events WHERE id > ? AND kind = coalesce(?, kind) ORDER BY id"
        return [self._event(row) for row in self._fetch(query, after, kind)]

    def last_event(self, kind: str) -> RunEvent | None:
        """Return the latest event of a kind."""
        query = "SELECT id, epoch_ns, kind, data FROM events WHERE kind = ? ORDER BY id DESC LIMIT 1"
        rows = self._fetch(query, kind)
        return self._event(rows[0]) if rows else None

    def frames(
        self, table: str, after_id: int = 0, stream: int | None = None, limit: int | None = None
    ) -> Iterator[Frame]:
        """Yield a table's frames after a cursor in commit order, which is the order of `seq` within a stream.

        Args:
            table: the table.
            after_id: id of the last frame seen.
            stream: only this stream.
            limit: maximum number of frames.
        """
        query = (
            "SELECT id, stream, seq, n, first_step, last_step, codec, data FROM frames "
            "WHERE tbl = ? AND id > ? AND stream = coalesce(?, stream) ORDER BY id LIMIT ?"
        )
        left = limit
        while left is None or left > 0:
            batch = _BATCH if left is None else min(_BATCH, left)
            rows = self._fetch(query, self._id(table), after_id, stream, batch)
            yield from self._intact_frames((table, row) for row in rows)

            if len(rows) < batch:
                return

            after_id = rows[-1][0]
            left = None if left is None else left - batch

    def frames_of(self, tables: Collection[str], after_id: int = 0, limit: int = _BATCH) -> list[Frame]:
        """Return the next frames of several tables after a cursor, in commit order; within a commit, names come first.

        Args:
            tables: names of tables; those missing in this store are ignored.
            after_id: id of the last frame seen.
            limit: maximum number of frames.
        """
        numbers = [self._ids[table] for table in tables if table in self._ids]
        # One statement, so all tables are read in one snapshot; each part uses its own index.
        part = "SELECT * FROM (SELECT id, tbl FROM frames WHERE tbl = ? AND id > ? ORDER BY id LIMIT ?)"
        parts = " UNION ALL ".join([part] * len(numbers))
        query = (
            "SELECT id, stream, seq, n, first_step, last_step, codec, data, tbl FROM frames "  # noqa: S608 - no values
            f"WHERE id IN (SELECT id FROM ({parts}) ORDER BY id LIMIT ?) ORDER BY id"
        )
        if not numbers:
            return []

        values = [value for number in numbers for value in (number, after_id, limit)]
        found = self._fetch(query, *values, limit)
        frames = self._intact_frames((self._names[row[8]], row[:8]) for row in found if row[8] in self._names)
        return list(frames) or (self.frames_of(tables, found[-1][0], limit) if found else [])

    def rows(
        self, table: str, streams: Collection[int] | None = None, last: int | None = None, after_id: int = 0
    ) -> NDArray[np.void]:
        """Return rows as a structured array: the column `stream` (its id), then the table's columns.

        Args:
            table: a packed table.
            streams: only these streams.
            last: only this many last rows of each stream.
            after_id: only frames after this cursor.
        """
        dtype = self._dtype(table)
        wanted = None if streams is None else set(streams)
        if last is None:
            frames = [frame for frame in self.frames(table, after_id) if wanted is None or frame.stream in wanted]
        else:
            frames = self._last_frames(table, wanted, last, after_id)

        return _assemble(frames, dtype, last)

    def log_rows(self, name: str, stream: int | None = None, after_id: int = 0) -> list[tuple[int, dict[str, Any]]]:
        """Return (stream, map) for each map of a log, in append order within a stream."""
        return [(frame.stream, row) for frame in self.frames(name, after_id, stream) for row in frame.maps()]

    def stored(self, table: str, stream: int | None = None) -> int:
        """Return the number of stored rows of a table, of all streams or of one."""
        self._update_progress()
        return sum(total.stored for key, total in self._progress.items() if _matches(key, table, stream))

    def lost(self, table: str, stream: int | None = None) -> int:
        """Return the exact number of rows of a table that were appended but never arrived.

        Rows after the last stored one are counted if the stream's facts have the total (`appended`).
        """
        self._update_progress()
        missing = 0
        for record in self.streams():
            if stream is not None and record.id != stream:
                continue

            total = self._progress.get((table, record.id), _Progress())
            appended = max(total.next_seq, int(record.facts.get("appended", {}).get(table, 0)))
            missing += appended - total.stored

        return missing

    def last_id(self) -> int:
        """Return the cursor of the newest frame of any table."""
        return int(self._fetch("SELECT coalesce(max(id), 0) FROM frames")[0][0])

    def _last_frames(self, table: str, wanted: set[int] | None, last: int, after_id: int) -> list[Frame]:
        """Read backward from the end until the last rows of every stream are found."""
        self._update_progress()
        totals = {key[1]: total for key, total in self._progress.items() if key[0] == table}
        missing = {stream for stream in totals if wanted is None or stream in wanted}
        have = dict.fromkeys(missing, 0)
        chosen: list[int] = []
        before = 1 << 62
        query = "SELECT id, stream, n FROM frames WHERE tbl = ? AND id < ? AND id > ? ORDER BY id DESC LIMIT ?"
        while missing and (rows := self._fetch(query, self._id(table), before, after_id, _META_BATCH)):
            before = rows[-1][0]
            for number, stream, n in rows:
                if stream in missing:
                    chosen.append(number)
                    have[stream] += n
                    if have[stream] >= last:
                        missing.discard(stream)

        return self._frames_by_id(table, sorted(chosen))

    def _frames_by_id(self, table: str, numbers: list[int]) -> list[Frame]:
        query = "SELECT id, stream, seq, n, first_step, last_step, codec, data FROM frames WHERE id = ?"
        return [self._frame(table, self._fetch(query, number)[0]) for number in numbers]

    def _intact_frames(self, rows: Iterable[tuple[str, tuple[Any, ...]]]) -> Iterator[Frame]:
        for table, row in rows:
            try:
                yield self._decoded(table, row)
            except ValueError as error:
                if self._on_damage is None:
                    raise self._damaged(str(error)) from error

                self._on_damage(str(error))

    def _frame(self, table: str, row: tuple[Any, ...]) -> Frame:
        try:
            return self._decoded(table, row)
        except ValueError as error:
            raise self._damaged(str(error)) from error

    def _decoded(self, table: str, row: tuple[Any, ...]) -> Frame:
        number, stream, seq, n, first, last, codec, data = row
        dtype = self._dtypes[table]
        try:
            decoded = decode(codec, data, dtype.itemsize if dtype is not None else 1)
        except ValueError as error:
            raise ValueError(f"frame {number} of {table}: {error}") from error

        if dtype is not None and len(decoded) != n * dtype.itemsize:
            raise ValueError(f"frame {number} of {table} has {len(decoded)} bytes for {n} rows")

        return Frame(number, stream, table, seq, n, first, last, decoded)

    def _update_progress(self) -> None:
        """Add the frames since the last call to the progress."""
        query = "SELECT id, stream, tbl, seq, n FROM frames WHERE id > ? ORDER BY id LIMIT ?"
        while rows := self._fetch(query, self._progress_after, _META_BATCH):
            for _, stream, number, seq, n in rows:
                if number not in self._names or not isinstance(n, int) or not isinstance(seq, int):
                    continue  # damaged: its table or number of rows is unknown

                total = self._progress.setdefault((self._names[number], stream), _Progress())
                total.stored += n
                total.next_seq = seq + n

            self._progress_after = rows[-1][0]

    def _id(self, table: str) -> int:
        try:
            return self._ids[table]
        except KeyError:
            raise StoreError(f"no table {table!r} in {self.path}; there are {', '.join(self._ids)}.") from None

    def _dtype(self, table: str) -> np.dtype[Any]:
        self._id(table)
        dtype = self._dtypes[table]
        if dtype is None:
            raise StoreError(f"{table!r} in {self.path} is a log of maps: read it with log_rows().")

        return dtype

    def _event(self, row: tuple[Any, ...]) -> RunEvent:
        return RunEvent(row[0], row[1], row[2], self._map(row[3], f"event {row[0]}"))

    def _map(self, data: bytes, what: str) -> dict[str, Any]:
        found = self._unpacked(data, what)
        if not isinstance(found, dict):
            raise self._damaged(f"{what} is not a map")

        return found

    def _unpacked(self, data: bytes, what: str) -> Any:
        try:
            return msgpack.unpackb(data, strict_map_key=False)
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise self._damaged(f"{what}: {error}") from error

    def _damaged(self, what: str) -> StoreError:
        return StoreError(f"the run's store {self.path} is damaged: {what}. Move it away; the run cannot be read.")

    def _fetch(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with translate_errors(self.path, "read"):
            return self._database.execute(query, values).fetchall()


def _dtype(layout: Any) -> np.dtype[Any] | None:
    if isinstance(layout, str):
        return None

    return np.dtype([(name, "<i8" if code == "q" else "<f8") for name, code in layout])


def _assemble(frames: list[Frame], dtype: np.dtype[Any], last: int | None) -> NDArray[np.void]:
    """Join frames into one array, the stream id as first column; sorted by stream where `last` is given."""
    source = np.frombuffer(b"".join(frame.data for frame in frames), dtype)
    joined = np.empty(len(source), np.dtype([("stream", "<i8"), *dtype.descr]))
    joined["stream"] = np.repeat([frame.stream for frame in frames], [frame.n for frame in frames])
    for name in dtype.names or ():
        joined[name] = source[name]

    if last is None or not len(joined):
        return joined

    joined = joined[np.argsort(joined["stream"], kind="stable")]
    _, counts = np.unique(joined["stream"], return_counts=True)
    keep = np.concatenate([np.arange(count) >= count - last for count in counts])
    kept: NDArray[np.void] = joined[keep]
    return kept


def _matches(key: tuple[str, int], table: str, stream: int | None) -> bool:
    return key[0] == table and (stream is None or key[1] == stream)
