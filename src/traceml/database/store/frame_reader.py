"""Reader of the frames of a run's store, also while it is being written, by cursor or by steps."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import msgpack
import msgspec
import numpy as np
from numpy.typing import NDArray

from traceml.database.schema import TABLES, Table
from traceml.database.store.frame_compression import decode_planes
from traceml.database.store.records import (
    FRAME_COLUMNS,
    FRAME_ROWS,
    Frame,
    NextRows,
    decoded_frame,
    dtype_of,
    in_ranges,
    step_offset,
)
from traceml.database.store.store_file import open_for_reading, translate_errors
from traceml.errors import StoreError, TableNotFoundError

__all__ = ["META_BATCH", "FrameReader"]

# A read transaction ends with each batch, so a slow reader never keeps the writer from reusing its log.
_BATCH = 64
META_BATCH = 8192
"""Frames per statement where only their numbers are read."""

_THREADS = 4
_SHARE = 16  # frames per task of a thread
_TRIED_IDS = 1 << 15  # that are missing in a row, where the list of frames is damaged; merged frames leave gaps

_FrameChoice = Callable[[NDArray[np.int64]], NDArray[np.bool_]]
_RowChoice = Callable[[NDArray[np.uint8]], NDArray[np.bool_]]


class _Following(msgspec.Struct):
    """One pass over frames: the cursor after it, and per (table, stream) the number of the next row.

    While it continues, the writer may merge frames that were read with ones that were not.
    """

    cursor: int
    next_rows: NextRows = {}


class FrameReader:
    """Reads frames of rows. One thread at a time; open it after any fork.

    Args:
        on_damage: called with a message for each damaged frame, which is then skipped; without it, they raise.

    Raises:
        StoreError: the store is missing, damaged, or has another version. All methods may raise it.
    """

    def __init__(self, path: Path, on_damage: Callable[[str], None] | None = None) -> None:
        self.path = Path(path)
        self._on_damage = on_damage
        self._last_stream = 0
        self._database = open_for_reading(self.path)
        with translate_errors(self.path, "read"):
            rows = self._database.execute("SELECT id, name, layout FROM tables").fetchall()

        self._ids: dict[str, int] = {name: number for number, name, _ in rows}
        self._names: dict[int, str] = {number: name for number, name, _ in rows}
        try:
            self._dtypes = {name: dtype_of(msgpack.unpackb(layout)) for _, name, layout in rows}
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            self._database.close()
            raise self._damaged(f"the layout of a table: {error}") from error

        self._followed: dict[tuple[str | int | None, ...], _Following] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    def __enter__(self) -> Self:
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

    def current_rows(self, frame: Frame) -> bytes:
        """Return the rows of a frame in this version's layout of their table, without columns that it lacks.

        A column that the store lacks is -1: not known.
        """
        stored, table = self._dtypes[frame.table], TABLES.get(frame.table)
        if stored is None or not isinstance(table, Table) or stored == table.dtype:
            return frame.data

        rows, current = np.frombuffer(frame.data, stored), np.full(frame.n, -1, table.dtype)
        for name in set(rows.dtype.names or ()) & set(table.names):
            current[name] = rows[name]

        return current.tobytes()

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def frames(
        self,
        table: str,
        after_id: int = 0,
        stream: int | None = None,
        limit: int | None = None,
        next_rows: NextRows | None = None,
    ) -> Iterator[Frame]:
        """Yield a table's frames after a cursor in commit order, which is the order of `seq` within a stream.

        Args:
            next_rows: as for `frames_of`.
        """
        query = (
            f"SELECT {FRAME_COLUMNS} FROM {FRAME_ROWS} "  # noqa: S608 - no values
            "WHERE tbl = ? AND frames.id > ? AND stream = coalesce(?, stream) ORDER BY frames.id LIMIT ?"
        )
        left = limit
        while left is None or left > 0:
            batch = _BATCH if left is None else min(_BATCH, left)
            rows = self._fetch(query, self._id(table), after_id, stream, batch)
            yield from self._new_frames((table, stream), ((table, row) for row in rows), after_id, next_rows)

            if len(rows) < batch:
                return

            after_id = rows[-1][0]
            left = None if left is None else left - batch

    def frames_of(
        self,
        tables: Collection[str],
        after_id: int = 0,
        limit: int = _BATCH,
        next_rows: NextRows | None = None,
    ) -> list[Frame]:
        """Return the next frames of several tables after a cursor, in commit order; within a commit, names come first.

        Args:
            tables: names of tables; those missing in this store are ignored.
            after_id: id of the last frame seen.
            next_rows: what the pass has read, changed here; needed where it goes over several readers, or where
                another pass over the same tables uses this one.
        """
        numbers = [self._ids[table] for table in tables if table in self._ids]
        # One statement, so all tables are read in one snapshot; each part uses its own index.
        part = "SELECT * FROM (SELECT id, tbl FROM frames WHERE tbl = ? AND id > ? ORDER BY id LIMIT ?)"
        parts = " UNION ALL ".join([part] * len(numbers))
        query = (
            f"SELECT {FRAME_COLUMNS}, tbl FROM {FRAME_ROWS} "  # noqa: S608 - no values
            f"WHERE frames.id IN (SELECT id FROM ({parts}) ORDER BY id LIMIT ?) ORDER BY frames.id"
        )
        if not numbers:
            return []

        values = [value for number in numbers for value in (number, after_id, limit)]
        found = self._fetch(query, *values, limit)
        known = ((self._names[row[-1]], row[:-1]) for row in found if row[-1] in self._names)
        frames = self._new_frames((*tables, None), known, after_id, next_rows)
        return list(frames) or (self.frames_of(tables, found[-1][0], limit, next_rows) if found else [])

    def salvaged_frames(self, tables: Iterable[str], after_id: int) -> Iterator[Frame]:
        """Yield the readable frames after a cursor, where a damaged page ends every other way to read.

        The others are left out without a word.

        Args:
            tables: the wanted ones; their frames come in this order.
        """
        columns = FRAME_COLUMNS.replace("coalesce(thinned, 0)", "0")  # they may be damaged, too
        found = self._salvaged_ids(after_id)
        for table in tables:
            for number in found.get(table, ()):
                with suppress(StoreError, ValueError):
                    for row in self._fetch(f"SELECT {columns} FROM frames WHERE id = ?", number):  # noqa: S608 - no values
                        yield self._decoded(table, row)

    def _salvaged_ids(self, after_id: int) -> dict[str, list[int]]:
        """Return the ids of the frames after a cursor by table, up to where too many in a row are missing."""
        found: dict[str, list[int]] = {}
        last, end = after_id, after_id + _TRIED_IDS
        while last < end:
            first, last = last + 1, last + META_BATCH
            for number, table in self._readable_ids(first, last):
                found.setdefault(self._names.get(table, ""), []).append(number)
                end = number + _TRIED_IDS

        return found

    def _readable_ids(self, first: int, last: int) -> list[tuple[Any, ...]]:
        """Return (id, table) of the frames of a range; where a page of it is damaged, of the halves of the range."""
        with suppress(StoreError):
            query = "SELECT id, tbl FROM frames NOT INDEXED WHERE id BETWEEN ? AND ? ORDER BY id"
            return self._fetch(query, first, last)

        middle = (first + last) // 2
        return [] if first == last else self._readable_ids(first, middle) + self._readable_ids(middle + 1, last)

    def step_frames(
        self, table: str, steps: Sequence[tuple[int, int]], streams: Collection[int] | None = None
    ) -> Iterator[Frame]:
        """Yield the frames that have rows in ranges of steps, cut to these rows, one at a time in memory.

        Frames elsewhere are not read. For a sample of a long run take the ranges of `thinning.sample_blocks`, which
        thinning keeps.

        Args:
            steps: ranges (first, last), both included, in order and disjoint.
        """
        offset = step_offset(self._dtype(table))
        ranges = np.array(steps, np.int64).reshape(-1, 2)
        wanted = None if streams is None else np.array(sorted(streams), np.int64)

        def choose(found: NDArray[np.int64]) -> NDArray[np.bool_]:
            _, stream, first, last = found.T
            begun, ended = np.searchsorted(ranges[:, 0], last, side="right"), np.searchsorted(ranges[:, 1], first)
            chosen: NDArray[np.bool_] = ended < begun
            return chosen if wanted is None else chosen & np.isin(stream, wanted)

        yield from self._chosen_parts(table, choose, lambda planes: in_ranges(_column(planes, offset or 0), ranges))

    def last_id(self) -> int:
        """Return the cursor of the newest frame of any table."""
        return int(self._fetch("SELECT coalesce(max(id), 0) FROM frames")[0][0])

    def _chosen_frames(self, table: str, choose: _FrameChoice, after_id: int = 0) -> Iterator[Frame]:
        """Yield the frames after a cursor that are chosen by their (id, stream, first step, last step)."""
        ended: dict[int, int] = {}
        for numbers in self._chosen_numbers(table, choose, after_id):
            for row in (row for batch in self._rows_by_id(numbers) for row in batch):
                whole = self._frame(table, row)
                frame = whole.after(ended.get(whole.stream, 0), step_offset(self._dtypes[table]))
                ended[frame.stream] = whole.end
                if frame.n:
                    yield frame

    def _chosen_parts(self, table: str, choose: _FrameChoice, rows: _RowChoice) -> Iterator[Frame]:
        """Yield chosen rows of chosen frames; a few threads decompress.

        Args:
            rows: which rows of a frame, by its bytes (see `decode_planes`).
        """
        ended: dict[int, int] = {}
        with ThreadPoolExecutor(min(os.cpu_count() or 1, _THREADS)) as threads:
            for numbers in self._chosen_numbers(table, choose, 0):
                for batch in self._rows_by_id(numbers):
                    # A frame that was merged with one that was read before, since then, is not read again.
                    new = [row for row in batch if row[2] >= ended.get(row[1], 0)]
                    ended.update((row[1], row[2] + row[3] + row[8]) for row in new)
                    shares = [new[first : first + _SHARE] for first in range(0, len(new), _SHARE)]
                    parts = threads.map(lambda share: [self._part(table, row, rows) for row in share], shares)
                    yield from (part for share in parts for part in share if part.n)

    def _chosen_numbers(self, table: str, choose: _FrameChoice, after_id: int) -> Iterator[list[int]]:
        """Yield ids of chosen frames, in a transaction for each batch."""
        query = "SELECT id, stream, first_step, last_step FROM frames WHERE tbl = ? AND id > ? ORDER BY id LIMIT ?"
        is_last = False
        while not is_last:
            with self._snapshot():  # the writer merges frames
                rows = self._fetch(query, self._id(table), after_id, META_BATCH)
                found = self._known_frames(table, rows)
                yield found[choose(found), 0].tolist()

            is_last = len(rows) < META_BATCH
            after_id = rows[-1][0] if rows else after_id

    def _known_frames(self, table: str, rows: list[tuple[Any, ...]]) -> NDArray[np.int64]:
        """Return (id, stream, first step, last step) of frames, without those of a damaged page."""
        try:
            found = np.array(rows, np.int64).reshape(-1, 4)
        except (ValueError, TypeError, OverflowError):
            whole = [row for row in rows if all(type(each) is int for each in row)]
            found = np.array(whole, np.int64).reshape(-1, 4)

        stream = found[:, 1]
        found = found[(stream > 0) & (stream <= self._newest_stream(int(stream.max(initial=0))))]
        if len(found) < len(rows):
            self._report_damage(f"{len(rows) - len(found)} frames of {table} have no proper stream or steps")

        return found

    def _newest_stream(self, wanted: int) -> int:
        """Return the largest id of a stream, which grows while the store is written."""
        if wanted > self._last_stream:
            self._last_stream = int(self._fetch("SELECT coalesce(max(id), 0) FROM streams")[0][0])

        return self._last_stream

    def _report_damage(self, what: str) -> None:
        if self._on_damage is None:
            raise self._damaged(what)

        self._on_damage(what)

    def _rows_by_id(self, numbers: list[int]) -> Iterator[list[tuple[Any, ...]]]:
        for first in range(0, len(numbers), _BATCH):
            batch = numbers[first : first + _BATCH]
            marks = ",".join("?" * len(batch))
            query = f"SELECT {FRAME_COLUMNS} FROM {FRAME_ROWS} WHERE frames.id IN ({marks}) ORDER BY frames.id"  # noqa: S608
            yield self._fetch(query, *batch)

    def _new_frames(
        self,
        what: tuple[str | int | None, ...],
        rows: Iterable[tuple[str, tuple[Any, ...]]],
        after_id: int,
        next_rows: NextRows | None,
    ) -> Iterator[Frame]:
        """Yield frames without the rows that the same pass has read before they were merged."""
        following = self._followed.get(what) if next_rows is None else _Following(after_id, next_rows)
        if following is None or following.cursor != after_id:
            following = self._followed[what] = _Following(after_id)

        for table, row in rows:
            following.cursor = row[0]
            try:
                whole = self._decoded(table, row)
            except ValueError as error:
                self._report_damage(str(error))
                continue

            key = (table, whole.stream)
            frame = whole.after(following.next_rows.get(key, 0), step_offset(self._dtypes[table]))
            following.next_rows[key] = whole.end
            if frame.n:
                yield frame

    def _frame(self, table: str, row: tuple[Any, ...]) -> Frame:
        try:
            return self._decoded(table, row)
        except ValueError as error:
            raise self._damaged(str(error)) from error

    def _decoded(self, table: str, row: tuple[Any, ...]) -> Frame:
        dtype = self._dtypes[table]
        _check_types(table, row)
        return decoded_frame(table, row, None if dtype is None else dtype.itemsize)

    def _part(self, table: str, row: tuple[Any, ...], rows: _RowChoice) -> Frame:
        """Return some rows of a frame."""
        number, stream, seq, n, first, last, codec, data, thinned = row
        try:
            _check_types(table, row)
            planes = decode_planes(codec, data, self._dtype(table).itemsize)
        except ValueError as error:
            raise self._damaged(f"frame {number} of {table}: {error}") from error

        if planes.shape[1] != n:
            raise self._damaged(f"frame {number} of {table} has {planes.size} bytes for {n} rows")

        chosen = planes[:, rows(planes)]
        if chosen.size and (offset := step_offset(self._dtypes[table])) is not None:
            first, last = _column(chosen[:, [0, -1]], offset).tolist()

        return Frame(
            id=number,
            stream=stream,
            table=table,
            seq=seq,
            n=chosen.shape[1],
            first_step=first,
            last_step=last,
            data=chosen.T.tobytes(),
            thinned=thinned,
        )

    def _id(self, table: str) -> int:
        try:
            return self._ids[table]
        except KeyError:
            raise TableNotFoundError(f"no table {table!r} in {self.path}; there are {', '.join(self._ids)}.") from None

    def _dtype(self, table: str) -> np.dtype[Any]:
        self._id(table)
        dtype = self._dtypes[table]
        if dtype is None:
            raise StoreError(f"{table!r} in {self.path} has maps, not columns: read it with Run.log({table!r}).")

        return dtype

    def _unpacked(self, data: bytes, what: str) -> Any:
        try:
            return msgpack.unpackb(data, strict_map_key=False)
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise self._damaged(f"{what}: {error}") from error

    def _damaged(self, what: str) -> StoreError:
        return StoreError(f"the run's store {self.path} is damaged: {what}. Move it away; the run cannot be read.")

    @contextmanager
    def _snapshot(self) -> Iterator[None]:
        """Read one state of the store in several statements."""
        if self._database.in_transaction:
            yield
            return

        self._fetch("BEGIN")
        try:
            yield
        finally:
            self._fetch("COMMIT")

    def _fetch(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with translate_errors(self.path, "read"):
            return self._database.execute(query, values).fetchall()


def _check_types(table: str, row: tuple[Any, ...]) -> None:
    """Refuse values of a damaged page: SQLite gives what it finds, whatever its column is declared to be."""
    *numbers, data, thinned = row
    if not isinstance(data, bytes) or not all(type(each) is int for each in (*numbers, thinned)):
        raise ValueError(f"frame {row[0]!r} of {table} has values of other types")


def _column(planes: NDArray[np.uint8], offset: int) -> NDArray[np.int64]:
    """Return a column of integers from the bytes of rows."""
    return np.ascontiguousarray(planes[offset : offset + 8].T).view("<i8").reshape(-1)
