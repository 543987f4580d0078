"""Rows of a run's logs, followed by cursor, each with its rank and its date."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from traceml.database.schema import INFO
from traceml.database.store.reader import StoreReader
from traceml.database.store.run_clocks import RunClocks

__all__ = ["LoggedRow", "LoggedRows"]

_FRAMES = 256  # read at once


class LoggedRow(NamedTuple):
    """One row of a log."""

    rank: int
    epoch_s: float
    values: Mapping[str, Any]


class LoggedRows:
    """Follows the rows of some logs, of all attempts and ranks.

    Args:
        tables: the logs.
        first_read: frames at the end of a store that are read at first; None: all.
    """

    def __init__(self, *tables: str, first_read: int | None = None) -> None:
        self._tables, self._first_read = tables, first_read
        self._after: int | None = None
        self._clocks = RunClocks(())
        self._ranks: dict[int, int] = {}

    def new(self, reader: StoreReader) -> Iterator[LoggedRow]:
        """Yield what arrived since the last call."""
        if self._after is None:
            self._after = 0 if self._first_read is None else max(reader.last_id() - self._first_read, 0)

        while frames := reader.frames_of(self._tables, self._after, _FRAMES):
            self._after = frames[-1].id
            for frame in frames:
                if frame.stream not in self._ranks:
                    streams = reader.streams()
                    self._clocks, self._ranks = RunClocks(streams), {stream.id: stream.rank for stream in streams}

                rank, is_info = self._ranks[frame.stream], frame.table == INFO.name
                date = self._clocks.from_monotonic if is_info else self._clocks.from_wall_clock
                for row in frame.maps():
                    yield LoggedRow(rank, date(frame.stream, int(row.get("t_ns", 0))) / 1e9, row)
