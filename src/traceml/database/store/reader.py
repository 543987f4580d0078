"""Reader of a run's store, also while it is being written. Frames and events are followed by cursor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from traceml.database.schema import RELAYED_WHOLE
from traceml.database.store.frame_reader import META_BATCH, FrameReader
from traceml.database.store.records import (
    FRAME_ROWS,
    Frame,
    NextRows,
    RunEvent,
    StreamIdentity,
    StreamRecord,
    assembled,
    rows_of,
)
from traceml.database.store.summaries import STEP_TABLES, StepSums, TableSums, sum_rows
from traceml.database.store.thinning import STATE_KEY

__all__ = ["Frame", "NextRows", "RunEvent", "StoreReader", "StreamIdentity", "StreamRecord"]

_SUMMED_BYTES = 4 << 20
_TRIES = 5  # the writer removes frames for some seconds, now and then
_NO_CURSOR = np.iinfo(np.int64).max


class _Progress(msgspec.Struct):
    """Progress of a (stream, table): its frames, number of stored rows, and the number of the next row."""

    first_id: int
    last_id: int = 0
    frames: int = 0
    stored: int = 0
    next_seq: int = 0


_NOTHING = _Progress(0)


class StoreReader(FrameReader):
    """Reads a run's store; its arguments and errors are those of `FrameReader`."""

    def __init__(self, path: Path, on_damage: Callable[[str], None] | None = None) -> None:
        super().__init__(path, on_damage)
        self._progress: dict[tuple[str, int], _Progress] = {}
        self._progress_after = 0
        self._emptied: dict[tuple[str, int], tuple[int, int]] = {}
        self._streams: dict[int, tuple[tuple[Any, ...], StreamRecord]] = {}

    def meta(self) -> dict[str, Any]:
        """Return the facts of the run."""
        return {
            key: self._unpacked(value, f"the fact {key!r}") for key, value in self._fetch("SELECT key, value FROM meta")
        }

    def streams(self, wanted: Collection[int] | None = None) -> list[StreamRecord]:
        """Return all streams or those that are wanted, in order of first appearance."""
        query = (
            "SELECT id, rank, attempt, host, pid, start_ticks, recorder, facts FROM streams "
            "WHERE ?1 IS NULL OR id IN (SELECT value FROM json_each(?1)) ORDER BY id"
        )
        return [self._stream(row) for row in self._fetch(query, _wanted(wanted))]

    def _stream(self, row: tuple[Any, ...]) -> StreamRecord:
        """Return the stream of a row; its facts are decoded when they have changed, as a report asks for it often."""
        known = self._streams.get(row[0])
        if known is None or known[0] != row:
            facts = self._map(row[7], f"stream {row[0]}")
            known = self._streams[row[0]] = row, StreamRecord(row[0], StreamIdentity(*row[1:7]), facts)

        return known[1]

    def events(self, after: int = 0, kind: str | None = None) -> list[RunEvent]:
        """Return the events after a cursor (the id of the last one seen), optionally of one kind."""
        query = "SELECT id, epoch_ns, kind, data FROM events WHERE id > ? AND kind = coalesce(?, kind) ORDER BY id"
        return [self._event(row) for row in self._fetch(query, after, kind)]

    def last_event(self, kind: str) -> RunEvent | None:
        """Return the latest event of a kind."""
        query = "SELECT id, epoch_ns, kind, data FROM events WHERE kind = ? ORDER BY id DESC LIMIT 1"
        rows = self._fetch(query, kind)
        return self._event(rows[0]) if rows else None

    def rows(
        self,
        table: str,
        streams: Collection[int] | None = None,
        last: int | None = None,
        steps: Sequence[tuple[int, int]] | None = None,
    ) -> NDArray[np.void]:
        """Return rows as a structured array: the column `stream` (its id), then the table's columns.

        Of a run that was thinned, only the rows that are left.

        Args:
            last: only this many last rows of each stream.
            steps: only rows of these ranges of steps, (first, last); not with `last`.
        """
        dtype = self._dtype(table)
        wanted = None if streams is None else set(streams)
        if steps is not None:
            frames = list(self.step_frames(table, steps, streams))
        elif last is None:
            frames = [frame for frame in self.frames(table) if wanted is None or frame.stream in wanted]
        else:
            with self._snapshot():
                frames = self._last_frames(table, wanted, last)

        return assembled(frames, dtype, last)

    def last_row(self, table: str, stream: int) -> np.void | None:
        """Return the last row of a stream; None without any."""
        rows = self.rows(table, [stream], last=1)
        return rows[-1] if len(rows) else None

    def spread_frames(self, table: str, streams: Collection[int], most: int, rows: int) -> Iterator[Frame]:
        """Yield rows of frames that are spread evenly over each stream.

        Args:
            most: about how many frames to read of all streams together; the first and the last of each are always read.
            rows: about how many rows of each frame, spread over it.
        """
        self._update_progress()
        known = {stream: total for stream in streams if (total := self._progress.get((table, stream))) is not None}
        frames_per_stream = max(most // max(len(known), 1), 1)
        size = max(known, default=0) + 1
        every, last, seen = np.zeros(size, np.int64), np.zeros(size, np.int64), np.zeros(size, np.int64)
        for stream, total in known.items():
            every[stream], last[stream] = -(-total.frames // frames_per_stream), total.last_id

        def choose(found: NDArray[np.int64]) -> NDArray[np.bool_]:
            stream = np.where(found[:, 1] < size, found[:, 1], 0)
            order = np.argsort(stream, kind="stable")
            _, starts, counts = np.unique(stream[order], return_index=True, return_counts=True)
            number = np.empty(len(stream), np.int64)
            number[order] = np.arange(len(stream)) - np.repeat(starts, counts)
            number += seen[stream]
            np.add.at(seen, stream, 1)
            chosen: NDArray[np.bool_] = (number % np.maximum(every[stream], 1) == 0) | (found[:, 0] == last[stream])
            return chosen & (every[stream] > 0)

        yield from self._chosen_parts(table, choose, lambda planes: _spread(planes.shape[1], rows))

    def log_rows(self, name: str) -> list[tuple[int, dict[str, Any]]]:
        """Return (stream, map) for each map of a log, in append order within a stream."""
        return [(frame.stream, row) for frame in self.frames(name) for row in frame.maps()]

    def first_maps(self, log: str, stream: int, frames: int) -> Iterator[dict[str, Any]]:
        """Yield the maps of a stream's first frames of a log; none where the store is older than the log."""
        if log in self.tables:
            for frame in self.frames(log, stream=stream, limit=frames):
                yield from frame.maps()

    def outer_maps(self, log: str, stream: int, frames: int) -> Iterator[dict[str, Any]]:
        """Yield the maps of a stream's first and last frames of a log, as many of both."""
        if log not in self.tables:
            return

        last = 0
        for frame in self.frames(log, stream=stream, limit=frames):
            last = frame.id
            yield from frame.maps()

        query = "SELECT id FROM frames WHERE tbl = ? AND stream = ? AND id > ? ORDER BY id DESC LIMIT 1 OFFSET ?"
        before_last = self._fetch(query, self._id(log), stream, last, frames)
        for frame in self.frames(log, before_last[0][0] if before_last else last, stream):
            yield from frame.maps()

    def frame_count(self, table: str) -> int:
        """Return the number of frames of a table."""
        return int(self._fetch("SELECT count(*) FROM frames WHERE tbl = ?", self._id(table))[0][0])

    def stored(self, tables: str | Collection[str], stream: int | None = None) -> int:
        """Return the number of stored rows of a table, or of several, of all streams or of one."""
        self._update_progress()
        names = _names(tables)
        emptied = sum(rows for key, (rows, _) in self._emptied.items() if _matches(key, names, stream))
        return emptied + sum(total.stored for key, total in self._progress.items() if _matches(key, names, stream))

    def check_frames(self) -> None:
        """Report damage in the list of frames: rows that are missing there are silently missing in what is read."""
        self._update_progress()

    def streams_with(self, table: str) -> set[int]:
        """Return the streams that have stored rows of a table."""
        self._update_progress()
        return {stream for name, stream in self._progress if name == table}

    def thinned(self, table: str) -> int:
        """Return how many of a table's stored rows were removed because of their age; the run's sums have them."""
        query = (
            "SELECT (SELECT coalesce(sum(thinned), 0) FROM frames JOIN thinnings ON thinnings.id = frames.id "
            "WHERE tbl = ?) + (SELECT coalesce(sum(rows), 0) FROM emptied WHERE tbl = ?)"
        )
        return int(self._fetch(query, self._id(table), self._id(table))[0][0])

    def thinned_rows(self) -> int:
        """Return how many stored rows of all tables were removed because of their age."""
        query = (
            "SELECT (SELECT coalesce(sum(thinned), 0) FROM thinnings) + (SELECT coalesce(sum(rows), 0) FROM emptied)"
        )
        return int(self._fetch(query)[0][0])

    def thinning_level(self) -> int:
        """Return the level to which old rows are thinned; 0 if none are."""
        return int(self.meta().get(STATE_KEY, {}).get("level", 0))

    def lost(self, tables: str | Collection[str], stream: int | None = None) -> int:
        """Return the exact number of rows of a table, or of several, that were appended but never arrived.

        Rows after the last stored one are counted if the stream's facts have the total (`appended`).
        """
        self._update_progress()
        names, records = _names(tables), self.streams()
        return sum(self._lost_of(record, names) for record in records if stream is None or record.id == stream)

    def _lost_of(self, record: StreamRecord, names: frozenset[str]) -> int:
        missing = 0
        for name in names & RELAYED_WHOLE if record.facts.get("relayed") else names:
            key = name, record.id
            total, (emptied, next_seq) = self._progress.get(key, _NOTHING), self._emptied.get(key, (0, 0))
            missing += max(total.next_seq, next_seq, record.appended(name)) - total.stored - emptied

        return missing

    def step_sums(self, streams: Collection[int] | None = None) -> dict[int, StepSums]:
        """Return the exact sums of all steps of the run, by stream, also of rows that were thinned.

        Reads the stored summaries and the rows after them. Of a store without summaries it reads all rows.

        Args:
            streams: those that are wanted; by default all.
        """
        return StepSums.by_stream(
            {table.name: self.table_sums(table.name, streams) for table in STEP_TABLES if table.name in self._ids}
        )

    def table_sums(self, table: str, streams: Collection[int] | None = None) -> dict[int, TableSums]:
        """Return the exact sums of a table by stream: its summaries, and the rows after them.

        Args:
            streams: those that are wanted; by default all.
        """
        if streams is None:
            self._update_progress()
            after = {stream: total.first_id - 1 for (name, stream), total in self._progress.items() if name == table}
        else:  # to count the frames of all streams would take longer than to read these
            after = dict.fromkeys(streams, 0)

        sums: dict[int, TableSums] = {}
        summed: dict[int, int] = {}
        query = (
            "SELECT stream, next_seq, after_id, data FROM summaries "
            "WHERE tbl = ?2 AND (?1 IS NULL OR stream IN (SELECT value FROM json_each(?1)))"
        )
        for stream, summed[stream], after[stream], data in self._fetch(query, _wanted(streams), self._id(table)):
            sums[stream] = self._decoded_sums(table, data)

        cursors = np.full(max(after, default=0) + 2, _NO_CURSOR)  # the last one is that of all later streams
        cursors[list(after)] = list(after.values())

        def is_new(found: NDArray[np.int64]) -> NDArray[np.bool_]:
            return np.asarray(found[:, 0] > cursors[np.minimum(found[:, 1], len(cursors) - 1)])

        waiting: list[Frame] = []
        size = 0
        for each in self._chosen_frames(table, is_new, int(cursors.min())):
            frame = each.after(summed.get(each.stream, 0))
            if not frame.n:
                continue

            waiting.append(frame)
            size += len(frame.data)
            if size > _SUMMED_BYTES:
                self._add_to(sums, table, waiting)
                size = 0

        self._add_to(sums, table, waiting)
        return sums

    def _add_to(self, sums: dict[int, TableSums], table: str, frames: list[Frame]) -> None:
        dtype = self._dtypes[table]
        if not frames or dtype is None:
            return

        for stream, new in sum_rows(table, *rows_of(frames, dtype)).items():
            sums[stream] = sums[stream].join(new) if stream in sums else new

        frames.clear()

    def _decoded_sums(self, table: str, data: bytes) -> TableSums:
        try:
            return TableSums.decoded(table, data)
        except ValueError as error:
            raise self._damaged(str(error)) from error

    def _last_frames(self, table: str, wanted: set[int] | None, last: int) -> list[Frame]:
        """Read backward from the end until the last rows of every stream are found; of each frame no more rows."""
        self._update_progress()
        totals = {key[1]: total for key, total in self._progress.items() if key[0] == table}
        missing = {stream for stream in totals if wanted is None or stream in wanted}
        have = dict.fromkeys(missing, 0)
        chosen: list[int] = []
        before = 1 << 62
        query = "SELECT id, stream, n FROM frames WHERE tbl = ? AND id < ? ORDER BY id DESC LIMIT ?"
        while missing and (rows := self._fetch(query, self._id(table), before, META_BATCH)):
            before = rows[-1][0]
            for number, stream, n in rows:
                if stream in missing:
                    chosen.append(number)
                    have[stream] += n
                    if have[stream] >= last:
                        missing.discard(stream)

        newest = (row for batch in self._rows_by_id(sorted(chosen)) for row in batch)
        return [self._part(table, row, lambda planes: np.arange(-planes.shape[1], 0) >= -last) for row in newest]

    def _update_progress(self) -> None:
        """Add the frames since the last call to the progress.

        Rows of a frame are consecutive, so their numbers show which rows of a merged frame were counted in its parts.
        When frames were removed meanwhile, all are counted again.
        """
        for _ in range(_TRIES):
            emptied = self._emptied_frames()
            if emptied != self._emptied:
                self._progress.clear()
                self._progress_after, self._emptied = 0, emptied

            self._count_new_frames()
            if self._emptied_frames() == emptied:
                return

    def _emptied_frames(self) -> dict[tuple[str, int], tuple[int, int]]:
        query = "SELECT tbl, stream, rows, next_seq FROM emptied"
        return {
            (self._names[number], stream): (rows, next_seq)
            for number, stream, rows, next_seq in self._fetch(query)
            if number in self._names
        }

    def _count_new_frames(self) -> None:
        columns = "frames.id, stream, tbl, seq, n + coalesce(thinned, 0)"
        query = f"SELECT {columns} FROM {FRAME_ROWS} WHERE frames.id > ? ORDER BY frames.id LIMIT ?"  # noqa: S608
        while rows := self._fetch(query, self._progress_after, META_BATCH):
            if rows[-1][0] <= self._progress_after:  # SQLite reads the rest of a page that was cut off as zeros
                self._report_damage("its frames are not in order, as in a file that was cut off")
                return

            for frame, stream, number, seq, n in rows:
                is_whole = number in self._names and all(isinstance(each, int) for each in (stream, seq, n))
                if not is_whole or not 0 < stream <= self._newest_stream(stream):
                    continue  # damaged: its table, stream or number of rows is unknown

                total = self._progress.setdefault((self._names[number], stream), _Progress(frame))
                total.stored += max(seq + n - max(seq, total.next_seq), 0)
                total.next_seq = max(seq + n, total.next_seq)
                total.last_id, total.frames = frame, total.frames + 1

            self._progress_after = rows[-1][0]

    def _event(self, row: tuple[Any, ...]) -> RunEvent:
        return RunEvent(row[0], row[1], row[2], self._map(row[3], f"event {row[0]}"))

    def _map(self, data: bytes, what: str) -> dict[str, Any]:
        found = self._unpacked(data, what)
        if not isinstance(found, dict):
            raise self._damaged(f"{what} is not a map")

        return found


def _spread(count: int, most: int) -> NDArray[np.bool_]:
    """Return which of some rows to take: the last one, and about `most` spread over them."""
    chosen = np.zeros(count, bool)
    chosen[:: -(-count // most)] = chosen[-1:] = True
    return chosen


def _names(tables: str | Collection[str]) -> frozenset[str]:
    return frozenset((tables,) if isinstance(tables, str) else tables)


def _matches(key: tuple[str, int], names: Collection[str], stream: int | None) -> bool:
    return key[0] in names and (stream is None or key[1] == stream)


def _wanted(streams: Collection[int] | None) -> str | None:
    """Return streams as a JSON list for a query; None for all."""
    return None if streams is None else str([*streams])
