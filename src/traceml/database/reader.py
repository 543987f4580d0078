"""Reading a run's store, also while it is written: everything is followed by a cursor."""

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

# A read transaction ends with each batch, so that a slow reader never keeps the writer from reusing its log.
_BATCH = 256
_META_BATCH = 8192


class StreamIdentity(NamedTuple):
    """One incarnation of a rank: what it appends has one numbering per table, from 0.

    `recorder` tells the recorders apart that one process may have one after another; "" where there is one.
    """

    rank: int
    attempt: int
    host: str
    pid: int
    start_ticks: int
    recorder: str = ""


@dataclass(frozen=True, slots=True)
class StreamRecord:
    """A stream as it is stored.

    Attributes:
        id: its number in this store.
        identity: who it is.
        facts: what the aggregator noted: world size, local rank, clock, state, exit, …
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
        """How often the job had been restarted."""
        return self.identity.attempt

    @property
    def host(self) -> str:
        """The host's name."""
        return self.identity.host

    @property
    def state(self) -> str:
        """The state that the aggregator noted last; `running` before any."""
        return str(self.facts.get("state", "running"))


@dataclass(frozen=True, slots=True)
class RunEvent:
    """Something that happened in the run; `id` is the cursor."""

    id: int
    epoch_ns: int
    kind: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Frame:
    """Consecutive rows of one stream's table; `id` is the cursor."""

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
            raise StoreError(f"frame {self.id} of {self.table} is damaged: it holds other things than maps")

        return rows


@dataclass(slots=True)
class _Total:
    """How far a (stream, table) came: rows stored, and the number of the row that comes next."""

    stored: int = 0
    next_seq: int = 0


class StoreReader:
    """Reads a run's store. One thread at a time; open it after any fork.

    Args:
        path: the file.
        on_damage: told of frames that are damaged, which are then left out; where it is not given they are an error.

    Raises:
        StoreError: there is none, it is damaged, or it is of another version. So do all methods.
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

        self._totals: dict[tuple[str, int], _Total] = {}
        self._totals_after = 0

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
        """Return a packed table's layout in this store, which an older version may have written; None of a log."""
        self._id(table)
        return self._dtypes[table]

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def meta(self) -> dict[str, Any]:
        """Return the facts of the run."""
        return {
            key: self._unpacked(value, f"the fact {key!r}") for key, value in self._all("SELECT key, value FROM meta")
        }

    def streams(self) -> list[StreamRecord]:
        """Return all streams, in the order of their first appearance."""
        rows = self._all("SELECT id, rank, attempt, host, pid, start_ticks, recorder, facts FROM streams ORDER BY id")
        return [StreamRecord(row[0], StreamIdentity(*row[1:7]), self._map(row[7], f"stream {row[0]}")) for row in rows]

    def events(self, after: int = 0, kind: str | None = None) -> list[RunEvent]:
        """Return the events after a cursor (the id of the last one seen), of one kind where given."""
        query = "SELECT id, epoch_ns, kind, data FROM events WHERE id > ? AND kind = coalesce(?, kind) ORDER BY id"
        return [self._event(row) for row in self._all(query, after, kind)]

    def last_event(self, kind: str) -> RunEvent | None:
        """Return the latest event of a kind."""
        query = "SELECT id, epoch_ns, kind, data FROM events WHERE kind = ? ORDER BY id DESC LIMIT 1"
        rows = self._all(query, kind)
        return self._event(rows[0]) if rows else None

    def frames(
        self, table: str, after_id: int = 0, stream: int | None = None, limit: int | None = None
    ) -> Iterator[Frame]:
        """Yield a table's frames after a cursor, in the order of their commit: per stream in the order of seq.

        Args:
            table: the table.
            after_id: id of the last frame seen.
            stream: only this stream's.
            limit: at most so many frames.
        """
        query = (
            "SELECT id, stream, seq, n, first_step, last_step, codec, data FROM frames "
            "WHERE tbl = ? AND id > ? AND stream = coalesce(?, stream) ORDER BY id LIMIT ?"
        )
        left = limit
        while left is None or left > 0:
            batch = _BATCH if left is None else min(_BATCH, left)
            rows = self._all(query, self._id(table), after_id, stream, batch)
            yield from self._whole((table, row) for row in rows)

            if len(rows) < batch:
                return

            after_id = rows[-1][0]
            left = None if left is None else left - batch

    def frames_of(self, tables: Collection[str], after_id: int = 0, limit: int = _BATCH) -> list[Frame]:
        """Return the next frames of several tables after a cursor, in the order of their commit, names first in each.

        Args:
            tables: which; those that this store does not have are left out.
            after_id: id of the last frame seen.
            limit: at most so many frames.
        """
        numbers = [self._ids[table] for table in tables if table in self._ids]
        # One statement, so that all tables are seen at the same moment; each part walks its own index.
        part = "SELECT * FROM (SELECT id, tbl FROM frames WHERE tbl = ? AND id > ? ORDER BY id LIMIT ?)"
        parts = " UNION ALL ".join([part] * len(numbers))
        query = (
            "SELECT id, stream, seq, n, first_step, last_step, codec, data, tbl FROM frames "  # noqa: S608 - no values
            f"WHERE id IN (SELECT id FROM ({parts}) ORDER BY id LIMIT ?) ORDER BY id"
        )
        if not numbers:
            return []

        values = [value for number in numbers for value in (number, after_id, limit)]
        found = self._all(query, *values, limit)
        frames = self._whole((self._names[row[8]], row[:8]) for row in found if row[8] in self._names)
        return list(frames) or (self.frames_of(tables, found[-1][0], limit) if found else [])

    def rows(
        self, table: str, streams: Collection[int] | None = None, last: int | None = None, after_id: int = 0
    ) -> NDArray[np.void]:
        """Return rows as a structured array: the column `stream` (its id), then the table's columns.

        Args:
            table: a packed table.
            streams: only these.
            last: only the last so many rows of each stream.
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
        """Return (stream, map) of a log, per stream in the order in which they were appended."""
        return [(frame.stream, row) for frame in self.frames(name, after_id, stream) for row in frame.maps()]

    def stored(self, table: str, stream: int | None = None) -> int:
        """Return how many rows of a table are stored, of all streams or of one."""
        self._count()
        return sum(total.stored for key, total in self._totals.items() if _matches(key, table, stream))

    def lost(self, table: str, stream: int | None = None) -> int:
        """Return how many rows of a table were appended and never arrived, exactly.

        Rows after the last stored one are counted when the stream's facts say how many there were (`appended`).
        """
        self._count()
        missing = 0
        for record in self.streams():
            if stream is not None and record.id != stream:
                continue

            total = self._totals.get((table, record.id), _Total())
            appended = max(total.next_seq, int(record.facts.get("appended", {}).get(table, 0)))
            missing += appended - total.stored

        return missing

    def last_id(self) -> int:
        """Return the cursor of the newest frame of any table."""
        return int(self._all("SELECT coalesce(max(id), 0) FROM frames")[0][0])

    def _last_frames(self, table: str, wanted: set[int] | None, last: int, after_id: int) -> list[Frame]:
        """Walk back from the end until every stream has given its last rows."""
        self._count()
        totals = {key[1]: total for key, total in self._totals.items() if key[0] == table}
        missing = {stream for stream in totals if wanted is None or stream in wanted}
        have = dict.fromkeys(missing, 0)
        chosen: list[int] = []
        before = 1 << 62
        query = "SELECT id, stream, n FROM frames WHERE tbl = ? AND id < ? AND id > ? ORDER BY id DESC LIMIT ?"
        while missing and (rows := self._all(query, self._id(table), before, after_id, _META_BATCH)):
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
        return [self._frame(table, self._all(query, number)[0]) for number in numbers]

    def _whole(self, rows: Iterable[tuple[str, tuple[Any, ...]]]) -> Iterator[Frame]:
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

    def _count(self) -> None:
        """Bring the totals up to date with the frames that came since."""
        query = "SELECT id, stream, tbl, seq, n FROM frames WHERE id > ? ORDER BY id LIMIT ?"
        while rows := self._all(query, self._totals_after, _META_BATCH):
            for _, stream, number, seq, n in rows:
                if number not in self._names or not isinstance(n, int) or not isinstance(seq, int):
                    continue  # damage: of no table, so nobody asks for it, or its rows cannot be told

                total = self._totals.setdefault((self._names[number], stream), _Total())
                total.stored += n
                total.next_seq = seq + n

            self._totals_after = rows[-1][0]

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
            raise self._damaged(f"{what} is no map")

        return found

    def _unpacked(self, data: bytes, what: str) -> Any:
        try:
            return msgpack.unpackb(data, strict_map_key=False)
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise self._damaged(f"{what}: {error}") from error

    def _damaged(self, what: str) -> StoreError:
        return StoreError(f"the run's store {self.path} is damaged: {what}. Move it away; the run cannot be read.")

    def _all(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with translate_errors(self.path, "read"):
            return self._database.execute(query, values).fetchall()


def _dtype(layout: Any) -> np.dtype[Any] | None:
    if isinstance(layout, str):
        return None

    return np.dtype([(name, "<i8" if code == "q" else "<f8") for name, code in layout])


def _assemble(frames: list[Frame], dtype: np.dtype[Any], last: int | None) -> NDArray[np.void]:
    """Join frames into one array with the stream's id as first column, stream after stream where `last` is given."""
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
