"""Reading what was logged, decoded, by a cursor: what every delivery works from.

A cursor is a map of two numbers, fit for JSON: `frame`, the last frame of the store that is done, and `row`, how many
rows of the next one are done as well.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from traceml.database.reader import Frame, StoreReader, StreamRecord
from traceml.database.schema import LOGGED, METRICS, NAMES
from traceml.errors import StoreError
from traceml.track.plugins.metric import Metric

__all__ = ["LoggedRecord", "RecordBatch", "RecordReader", "logged_rows", "metrics_of", "position"]

_S = 1_000_000_000  # whole seconds apart: a quotient of nanoseconds is not exact in a double
_ROW = struct.Struct("<qqqdqq")
_FRAMES = 64
_BATCH_ROWS = 5_000


class LoggedRecord(NamedTuple):
    """Something logged that is no number.

    Attributes:
        stream: the stream that it came in; a rank may have several, one per process.
        row: what was logged; see `database.schema.LOGGED`.
    """

    stream: StreamRecord
    row: dict[str, Any]


@dataclass(slots=True)
class RecordBatch:
    """What was logged between two cursors, in the order of the store: per process that of the calls.

    Attributes:
        cursor: where to go on after it.
        rows: how many rows a user logged.
        metrics: the values by stream and number of the experiment.
        logged: everything else.
        frames: frames of the tables that were asked for as well.
        is_last: whether the store held nothing after it.
    """

    cursor: dict[str, int]
    rows: int = 0
    metrics: dict[tuple[int, int], list[Metric]] = field(default_factory=dict)
    logged: list[LoggedRecord] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    is_last: bool = True


class RecordReader:
    """Follows a store. What it returns depends on the cursor alone, so that what is read again is the same again.

    Args:
        reader: the run's store.
        also: packed tables whose frames are returned as they are.
    """

    def __init__(self, reader: StoreReader, also: tuple[str, ...] = ()) -> None:
        self._reader = reader
        self._tables = (NAMES.name, METRICS.name, LOGGED.name, *also)
        self._streams: dict[int, StreamRecord] = {}
        self._names: dict[tuple[int, int], str] = {}
        self._names_after = 0

    def stream(self, number: int) -> StreamRecord:
        """Return a stream by its number."""
        if number not in self._streams:
            self._streams = {record.id: record for record in self._reader.streams()}

        return self._streams[number]

    def read(
        self, cursor: Mapping[str, int], rows: int = _BATCH_ROWS, until: Mapping[str, int] | None = None
    ) -> RecordBatch:
        """Return what comes after a cursor; its own cursor is the same where there is nothing.

        Args:
            cursor: where to begin; empty for the beginning.
            rows: at most so many rows that a user logged.
            until: another cursor, at which it ends at the latest.

        Raises:
            StoreError: the store cannot be read, or is damaged.
        """
        after, done = int(cursor.get("frame", 0)), int(cursor.get("row", 0))
        batch = RecordBatch({"frame": after, "row": done})
        self._learn_up_to(after)
        found = self._reader.frames_of(self._tables, after, _FRAMES)
        for frame in found:
            room = rows - batch.rows
            if until is not None and batch.cursor["frame"] >= until["frame"]:
                room = min(room, until["row"] - done)

            # The frame in which it ends is begun only where there is room for a row of it.
            if room <= 0:
                batch.is_last = False
                return batch

            whole = self._take(batch, frame, done, room)
            if whole is not None:
                batch.cursor["row"] = whole
                batch.is_last = False
                return batch

            done = 0
            batch.cursor = {"frame": frame.id, "row": 0}

        batch.is_last = len(found) < _FRAMES
        return batch

    def _take(self, batch: RecordBatch, frame: Frame, done: int, room: int) -> int | None:
        """Put a frame into a batch; return None when all of it is done, else how many of its rows are."""
        if frame.table == NAMES.name:
            self._learn(frame)
            return None

        if frame.table not in (METRICS.name, LOGGED.name):
            batch.frames.append(frame)
            return None

        stop = min(done + room, frame.n)
        if frame.table == METRICS.name:
            for experiment, row in metrics_of(frame, self.stream(frame.stream).rank, self._names, done, stop):
                batch.metrics.setdefault((frame.stream, experiment), []).append(row)
        else:
            stream = self.stream(frame.stream)
            batch.logged += [LoggedRecord(stream, row) for row in frame.maps()[done:stop]]

        batch.rows += stop - done
        return stop if stop < frame.n else None

    def _learn_up_to(self, last: int) -> None:
        """Learn the names that were given before a cursor."""
        if last <= self._names_after or NAMES.name not in self._reader.tables:
            return

        for frame in self._reader.frames(NAMES.name, self._names_after):
            self._learn(frame)

        self._names_after = max(self._names_after, last)

    def _learn(self, frame: Frame) -> None:
        for row in frame.maps():
            self._names[frame.stream, row["id"]] = row["name"]

        self._names_after = max(self._names_after, frame.id)


def position(cursor: Mapping[str, int]) -> tuple[int, int]:
    """Return what orders cursors."""
    return int(cursor.get("frame", 0)), int(cursor.get("row", 0))


def logged_rows(reader: StoreReader) -> int:
    """Return how many rows users have logged, as far as they are stored."""
    return sum(reader.stored(table) for table in (METRICS.name, LOGGED.name) if table in reader.tables)


def metrics_of(
    frame: Frame, rank: int, names: Mapping[tuple[int, int], str], start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, Metric]]:
    """Yield (number of the experiment, value) for rows of a frame of `metrics`.

    Args:
        frame: the frame.
        rank: whose it is.
        names: (stream, number) -> name.
        start: the first row.
        stop: the row to stop before.
    """
    data = memoryview(frame.data)[start * _ROW.size : None if stop is None else stop * _ROW.size]
    try:
        for t_ns, step, name_id, value, kind, experiment in _ROW.iter_unpack(data):
            name = names.get((frame.stream, name_id))
            name = f"(name {name_id})" if name is None else name
            yield experiment, Metric(name, value, step, t_ns // _S + t_ns % _S / _S, rank, kind)
    except struct.error as error:
        raise StoreError(f"frame {frame.id} of {frame.table} is damaged: {error}") from error
