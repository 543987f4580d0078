"""Reader of logged rows, decoded, by a cursor.

A cursor is a map of two numbers, for JSON: `frame`, the last frame of the store that is done, and `row`, the number of
rows of the next frame that are done.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from traceml.database.schema import LOGGED, METRICS, NAMES
from traceml.database.store.reader import Frame, StoreReader, StreamRecord
from traceml.database.store.records import names_of
from traceml.errors import StoreError
from traceml.track.plugins.metric import Metric

__all__ = ["LoggedRecord", "MetricRows", "RecordBatch", "RecordReader", "logged_rows", "position"]

_S = 1_000_000_000
_ROW = struct.Struct("<qqqdqq")
_FRAMES, _READS = 64, 4  # frames of one read, of which a batch needs few where they are full, and reads for a batch
_BATCH_ROWS = 5_000


class LoggedRecord(NamedTuple):
    """A logged row that is not a number."""

    stream: StreamRecord  # its stream; a rank may have several, one per process
    row: dict[str, Any]  # its content; see `database.schema.LOGGED`


class MetricRows(NamedTuple):
    """Values of one frame that belong to one experiment."""

    stream: int
    experiment: int  # its number
    rows: list[Metric]


class RecordBatch(msgspec.Struct):
    """Rows between two cursors, in the order of the store, which per process is the order of the calls."""

    cursor: dict[str, int]  # cursor after the batch
    rows: int = 0  # number of rows that a user logged
    # Values, all other logged rows, and frames of the tables requested in addition.
    parts: list[MetricRows | LoggedRecord | Frame] = []
    reached: dict[tuple[int, str], int] = {}  # number of rows of each stream and table up to the end of the batch
    is_last: bool = True  # whether the store had nothing after it

    @property
    def metrics(self) -> list[MetricRows]:
        """The values."""
        return [part for part in self.parts if isinstance(part, MetricRows)]

    @property
    def logged(self) -> list[LoggedRecord]:
        """The logged rows that are no values."""
        return [part for part in self.parts if isinstance(part, LoggedRecord)]

    @property
    def frames(self) -> list[Frame]:
        """The frames of the tables requested in addition."""
        return [part for part in self.parts if isinstance(part, Frame)]


class RecordReader:
    """Follows a store. A batch depends on the cursor alone, so that reading again gives the same batch.

    Args:
        also: packed tables whose frames are returned unchanged.
    """

    def __init__(self, reader: StoreReader, also: tuple[str, ...] = ()) -> None:
        self._reader = reader
        self._tables = (NAMES.name, METRICS.name, LOGGED.name, *also)
        self._streams: dict[int, StreamRecord] = {}
        self._names: dict[tuple[int, int], str] = {}
        self._names_after = 0

    def stream(self, number: int, *, fresh: bool = False) -> StreamRecord:
        """Return a stream by its number.

        Args:
            fresh: read it again: its facts may have changed since its first row.
        """
        if fresh or number not in self._streams:
            self._streams = {record.id: record for record in self._reader.streams()}

        return self._streams[number]

    def read(
        self, cursor: Mapping[str, int], rows: int = _BATCH_ROWS, until: Mapping[str, int] | None = None
    ) -> RecordBatch:
        """Return the batch after a cursor; its cursor is the same when there is nothing.

        Args:
            cursor: start of the batch; empty for the beginning.
            rows: most rows that a user logged.
            until: a cursor that the batch does not pass.

        Raises:
            StoreError: the store cannot be read, or is damaged.
        """
        after, done = int(cursor.get("frame", 0)), int(cursor.get("row", 0))
        batch = RecordBatch({"frame": after, "row": done})
        self._read_names_up_to(after)
        taken = 0
        for frame in self._frames(after):
            room = rows - batch.rows
            if until is not None and batch.cursor["frame"] >= until["frame"]:
                room = min(room, until["row"] - done)

            # A frame is begun only with room for at least one of its rows.
            if room <= 0:
                batch.is_last = False
                return batch

            stopped_at = self._take(batch, frame, done, room)
            if stopped_at is not None:
                batch.cursor["row"] = stopped_at
                batch.is_last = False
                return batch

            done = 0
            batch.cursor = {"frame": frame.id, "row": 0}
            taken += 1

        batch.is_last = taken < _FRAMES * _READS
        return batch

    def _frames(self, after: int) -> Iterator[Frame]:
        """Yield the frames after one, up to a limit."""
        for _ in range(_READS):
            found = self._reader.frames_of(self._tables, after, _FRAMES)
            yield from found
            if len(found) < _FRAMES:
                return

            after = found[-1].id

    def _take(self, batch: RecordBatch, frame: Frame, done: int, room: int) -> int | None:
        """Add a frame to a batch; return None when all of it is done, else the number of its rows that are."""
        if frame.table == NAMES.name:
            self._add_names(frame)
            return None

        if frame.table not in (METRICS.name, LOGGED.name):
            batch.parts.append(frame)
            return None

        stop = min(done + room, frame.n)
        if frame.table == METRICS.name:
            found: dict[int, list[Metric]] = {}
            for experiment, row in _metrics_of(frame, self.stream(frame.stream).rank, self._names, done, stop):
                found.setdefault(experiment, []).append(row)

            batch.parts += [MetricRows(frame.stream, experiment, rows) for experiment, rows in found.items()]
        else:
            stream = self.stream(frame.stream)
            batch.parts += [LoggedRecord(stream, row) for row in frame.maps()[done:stop]]

        batch.rows += stop - done
        batch.reached[frame.stream, frame.table] = frame.seq + stop
        return stop if stop < frame.n else None

    def _read_names_up_to(self, last: int) -> None:
        """Read the names of metrics up to a frame."""
        if last <= self._names_after or NAMES.name not in self._reader.tables:
            return

        for frame in self._reader.frames(NAMES.name, self._names_after):
            self._add_names(frame)

        self._names_after = max(self._names_after, last)

    def _add_names(self, frame: Frame) -> None:
        self._names |= {(frame.stream, number): name for number, name in names_of(frame.maps())}
        self._names_after = max(self._names_after, frame.id)


def position(cursor: Mapping[str, int]) -> tuple[int, int]:
    """Return a cursor as a tuple, which orders."""
    return int(cursor.get("frame", 0)), int(cursor.get("row", 0))


def logged_rows(reader: StoreReader) -> int:
    """Return the number of stored rows that users logged."""
    return sum(reader.stored(table) for table in (METRICS.name, LOGGED.name) if table in reader.tables)


def _metrics_of(
    frame: Frame, rank: int, names: Mapping[tuple[int, int], str], start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, Metric]]:
    """Yield (number of the experiment, value) for rows of a frame of `metrics`."""
    data = memoryview(frame.data)[start * _ROW.size : None if stop is None else stop * _ROW.size]
    try:
        for t_ns, step, name_id, value, kind, experiment in _ROW.iter_unpack(data):
            name = names.get((frame.stream, name_id))
            name = f"(name {name_id})" if name is None else name
            yield experiment, Metric(name, value, step, t_ns // _S + t_ns % _S / _S, rank, kind)
    except struct.error as error:
        raise StoreError(f"frame {frame.id} of {frame.table} is damaged: {error}") from error
