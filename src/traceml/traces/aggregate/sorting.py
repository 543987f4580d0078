"""External merge sort of rows by time.

At most LIMIT rows are held in memory; beyond, sorted runs are written to an unnamed temporary file. The merge reads all
runs block by block. A trace that is in order, or nearly, as most are, costs little more than one pass.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from traceml.errors import StoreError

__all__ = ["LIMIT", "RUN", "ExternalSorter", "RowColumns"]

LIMIT = 1 << 21  # rows in memory
RUN = 1 << 18  # rows of a run: their columns are large enough for huge pages, which numpy then asks for
_ALIGNED_BYTES = 64

RowColumns = tuple[NDArray[Any], ...]


class ExternalSorter:
    """Sorter of rows by their first column; rows are columns of equal length, and ties keep their order.

    Args:
        run: rows that are sorted at once.
    """

    def __init__(self, limit: int = LIMIT, run: int = RUN) -> None:
        self._limit, self._run = limit, run
        self._fresh: list[RowColumns] = []
        self._runs: list[_SortedRun] = []
        self._file: IO[bytes] | None = None
        self._fresh_rows = self._held_rows = 0
        self.rows = 0

    def add(self, *columns: NDArray[Any]) -> None:
        """Add rows; the first column is the time."""
        if not len(columns[0]):
            return

        self._fresh.append(columns)
        self._fresh_rows += len(columns[0])
        self.rows += len(columns[0])
        if self._fresh_rows >= self._run:
            self._close_run()

    def columns(self) -> RowColumns:
        """Return all rows unsorted, if no run was closed yet; empty when there are none."""
        assert not self._runs
        return tuple(np.concatenate(each) for each in zip(*self._fresh, strict=True))

    def blocks(self) -> Iterator[RowColumns]:
        """Yield all rows in order, in blocks; once."""
        self._close_run()
        try:
            yield from self._merged()
        finally:
            if self._file is not None:
                self._file.close()

    def _merged(self) -> Iterator[RowColumns]:
        waiting = deque(sorted(self._runs, key=lambda run: run.first))
        block = max(1024, self._limit // (2 * _most_at_once(waiting)))
        cursors: list[_RunCursor] = []
        while waiting or cursors:
            until = waiting[0].first if waiting else None
            rows = _merge_step(cursors, until)
            if rows is not None:
                yield rows
            elif waiting:
                cursors.append(_RunCursor(waiting.popleft(), block))
                cursors.sort(key=lambda cursor: cursor.number)  # ties keep the order of the runs

            cursors = [cursor for cursor in cursors if not cursor.exhausted]

    def _close_run(self) -> None:
        if not self._fresh:
            return

        columns = _together(self._fresh, self._fresh_rows)
        self._fresh, self._fresh_rows = [], 0
        self._runs.append(_SortedRun.of(len(self._runs), _sorted(columns)))
        self._held_rows += len(columns[0])
        if self._held_rows > self._limit:
            self._spill()

    def _spill(self) -> None:
        import tempfile  # few traces are that long

        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="traceml-")  # noqa: SIM115 - closed with the sorter

            for run in self._runs:
                run.move_to(self._file)
        except OSError as error:
            raise StoreError(
                f"cannot sort {self.rows:,} events of a trace in {tempfile.gettempdir()}: {error}. "
                "Set TMPDIR to a folder with more room"
            ) from error

        self._held_rows = 0


@dataclass(slots=True)
class _SortedRun:
    """Sorted rows, in memory or in a file, column by column; `first` and `last` are the times at the ends."""

    number: int
    rows: int
    first: int
    last: int
    columns: RowColumns
    file: IO[bytes] | None = None
    offsets: Sequence[int] = ()

    @classmethod
    def of(cls, number: int, columns: RowColumns) -> _SortedRun:
        times = columns[0]
        return cls(number, len(times), int(times[0]), int(times[-1]), columns)

    def move_to(self, file: IO[bytes]) -> None:
        if self.file is not None:
            return

        offsets, at = [], file.seek(0, 2)
        for column in self.columns:
            offsets.append(at)
            at += file.write(np.ascontiguousarray(column).data.cast("B"))

        file.flush()
        self.columns = tuple(column[:0].copy() for column in self.columns)
        self.file, self.offsets = file, offsets

    def read(self, first: int, last: int) -> RowColumns:
        if self.file is None:
            return tuple(column[first:last] for column in self.columns)

        return tuple(
            self._read_column(column.dtype, offset, first, last)
            for column, offset in zip(self.columns, self.offsets, strict=True)
        )

    def _read_column(self, dtype: np.dtype[Any], offset: int, first: int, last: int) -> NDArray[Any]:
        assert self.file is not None
        self.file.seek(offset + first * dtype.itemsize)
        return np.frombuffer(self.file.read((last - first) * dtype.itemsize), dtype)


class _RunCursor:
    """Position of the merge in one run."""

    def __init__(self, run: _SortedRun, block: int) -> None:
        self.number = run.number
        self._run, self._block, self._next = run, block, 0
        self.rows: RowColumns = ()
        self.load()

    @property
    def exhausted(self) -> bool:
        return self.complete and not len(self.rows[0])

    @property
    def complete(self) -> bool:
        """Whether the whole run was loaded."""
        return self._next >= self._run.rows

    @property
    def last(self) -> int:
        """The last time that was loaded."""
        return int(self.rows[0][-1])

    def load(self) -> None:
        """Load another block."""
        last = min(self._next + self._block, self._run.rows)
        more = self._run.read(self._next, last)
        self.rows = tuple(np.concatenate(pair) for pair in zip(self.rows, more, strict=True)) if self.rows else more
        self._next = last

    def take(self, count: int) -> RowColumns:
        taken = tuple(column[:count] for column in self.rows)
        self.rows = tuple(column[count:] for column in self.rows)
        if not len(self.rows[0]) and not self.complete:
            self.rows = ()
            self.load()

        return taken


def _together(parts: Sequence[RowColumns], rows: int) -> RowColumns:
    """Return rows as columns in one piece of memory: fresh memory costs more than copying, small pages most."""
    memory = np.empty(sum(_room(column, rows) for column in parts[0]), np.uint8)
    columns, at = list[NDArray[Any]](), 0
    for each in zip(*parts, strict=True):
        into = memory[at : at + rows * each[0].itemsize].view(each[0].dtype)
        columns.append(np.concatenate(each, out=into))
        at += _room(each[0], rows)

    return tuple(columns)


def _room(column: NDArray[Any], rows: int) -> int:
    """Return the bytes for rows of a column, up to where the next one is aligned."""
    return -(-rows * column.itemsize // _ALIGNED_BYTES) * _ALIGNED_BYTES


def _most_at_once(runs: Iterable[_SortedRun]) -> int:
    """Return how many runs overlap in time at most, of runs in the order of their starts; 1 or more."""
    ends: list[int] = []
    most = 1
    for run in runs:
        while ends and ends[0] < run.first:
            heapq.heappop(ends)

        heapq.heappush(ends, run.last)
        most = max(most, len(ends))

    return most


def _merge_step(cursors: list[_RunCursor], until: int | None) -> RowColumns | None:
    """Take the rows that precede all rows that are not loaded yet; None if the next run has to be opened first.

    Args:
        until: the first time of the next run; None without one.
    """
    while True:
        unfinished = [cursor for cursor in cursors if not cursor.complete]
        bounds = [cursor.last for cursor in unfinished] + ([] if until is None else [until])
        if not bounds:
            return _joined([cursor.take(len(cursor.rows[0])) for cursor in cursors])

        horizon = min(bounds)
        counts = [int(cursor.rows[0].searchsorted(horizon, side="left")) for cursor in cursors]
        if any(counts):
            return _joined([cursor.take(count) for cursor, count in zip(cursors, counts, strict=True) if count])

        if horizon == until:
            return None

        # a block with a single time: ties must be together to keep their order
        min(unfinished, key=lambda cursor: cursor.last).load()


def _joined(parts: list[RowColumns]) -> RowColumns:
    if len(parts) == 1:
        return parts[0]

    return _sorted(tuple(np.concatenate(each) for each in zip(*parts, strict=True)))


def _sorted(columns: RowColumns) -> RowColumns:
    times = columns[0]
    if len(times) < 2 or bool((times[1:] >= times[:-1]).all()):
        return columns

    order = np.argsort(times, kind="stable")
    return tuple(column[order] for column in columns)
