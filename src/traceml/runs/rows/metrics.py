"""Metrics of a run by name, followed by cursor, and their summary for the report."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from traceml.database.schema import METRICS, NAMES
from traceml.database.store.reader import StoreReader

__all__ = ["MetricFigures", "MetricFrame", "MetricReader", "MetricSummary"]

# A report is read by people and loaded whole; a run may have a hundred thousand names.
_SHOWN_NAMES = 1000
_FRAMES = 256


@dataclass(frozen=True, slots=True)
class MetricFrame:
    """Values that one rank logged, sorted by name; those of a name in the order of logging.

    Attributes:
        names: each name once, with `/rank_r` for ranks above 0.
        starts: index of the first row of each name.
        rows: rows of `schema.METRICS`.
    """

    names: list[str]
    starts: NDArray[np.int64]
    rows: NDArray[np.void]

    @property
    def ends(self) -> list[int]:
        """Index after the last row of each name."""
        return [*self.starts[1:].tolist(), len(self.rows)]


class MetricReader:
    """Reads the metrics of all attempts and ranks by cursor."""

    def __init__(self) -> None:
        self._after = 0
        self._names: dict[tuple[int, int], str] = {}
        self._ranks: dict[int, int] = {}

    def read(self, reader: StoreReader) -> Iterator[list[MetricFrame]]:
        """Return what arrived since the last call, some hundred frames at a time."""
        if METRICS.name not in reader.tables:
            return  # a store that is older than the table

        while frames := reader.frames_of((NAMES.name, METRICS.name), self._after, _FRAMES):
            self._after = frames[-1].id
            found = []
            for frame in frames:
                if frame.table == NAMES.name:
                    self._names.update(((frame.stream, row["id"]), row["name"]) for row in frame.maps())
                    continue

                if frame.stream not in self._ranks:
                    self._ranks = {record.id: record.rank for record in reader.streams()}

                found.append(self._frame(frame.stream, np.frombuffer(frame.data, METRICS.dtype)))

            yield found

    def _frame(self, stream: int, rows: NDArray[Any]) -> MetricFrame:
        rows = rows[np.argsort(rows["name_id"], kind="stable")]
        ids, starts = np.unique(rows["name_id"], return_index=True)
        rank = self._ranks[stream]
        suffix = f"/rank_{rank}" if rank else ""
        names = [self._names.get((stream, number), f"(name {number})") + suffix for number in ids.tolist()]
        return MetricFrame(names, starts, rows)


class MetricFigures(NamedTuple):
    """Figures of one metric over all of its values; NaN if none of them is finite."""

    last: float
    least: float
    greatest: float
    number: int


class MetricSummary:
    """Last, least, greatest value and count per name; all attempts and ranks."""

    def __init__(self) -> None:
        self._reader = MetricReader()
        self._found: dict[str, list[float]] = {}  # name -> [last, its time, least, greatest, count]
        self._hidden: set[str] = set()

    @property
    def hidden(self) -> int:
        """Number of names that are left out, because there are too many."""
        return len(self._hidden)

    def update(self, reader: StoreReader) -> bool:
        """Take what arrived since the last call; return whether there was anything."""
        changed = False
        for frames in self._reader.read(reader):
            changed = True
            for frame in frames:
                self._take(frame)

        return changed

    def figures(self) -> dict[str, MetricFigures]:
        """Return the figures of each name."""
        return {
            name: MetricFigures(last, least, greatest, int(count))
            for name, (last, _, least, greatest, count) in self._found.items()
        }

    def _take(self, frame: MetricFrame) -> None:
        values, times = frame.rows["value"], frame.rows["t_ns"]
        least, greatest = np.fmin.reduceat(values, frame.starts), np.fmax.reduceat(values, frame.starts)
        for at, (name, start, end) in enumerate(zip(frame.names, frame.starts.tolist(), frame.ends, strict=True)):
            entry = self._entry(name)
            if entry is None:
                continue

            if times[end - 1] >= entry[1]:
                entry[0], entry[1] = float(values[end - 1]), float(times[end - 1])

            entry[2], entry[3] = float(np.fmin(entry[2], least[at])), float(np.fmax(entry[3], greatest[at]))
            entry[4] += end - start

    def _entry(self, name: str) -> list[float] | None:
        if name not in self._found and len(self._found) >= _SHOWN_NAMES:
            self._hidden.add(name)
            return None

        return self._found.setdefault(name, [math.nan, -1.0, math.nan, math.nan, 0])
