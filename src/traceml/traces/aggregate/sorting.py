"""External merge sort of rows by time.

At most LIMIT rows are held in memory; beyond, sorted runs are written to an unnamed temporary file. The merge reads all
runs block by block. A trace that is in order, or nearly, as most are, costs little more than one pass.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from traceml.errors import StoreError

__all__ = ["LIMIT", "RUN", "ExternalSorter", "RowColumns"]

LIMIT = 1 << 19  # rows in memory
RUN = 1 << 17  # rows of a run

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
        cursors = [_RunCursor(run, max(1024, self._limit // (2 * len(self._runs)))) for run in self._runs]
        while cursors:
            rows = _merge_step(cursors)
            if len(rows[0]):
                yield rows

            cursors = [cursor for cursor in cursors if not cursor.exhausted]

    def _close_run(self) -> None:
        if not self._fresh:
            return

        columns = tuple(np.concatenate(each) for each in zip(*self._fresh, strict=True))
        self._fresh, self._fresh_rows = [], 0
        self._runs.append(_SortedRun(len(columns[0]), _sorted(columns)))
        self._held_rows += len(columns[0])
        if self._held_rows > self._limit:
            self._spill()

    def _spill(self) -> None:
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
    """Sorted rows, in memory or in a file, column by column."""

    rows: int
    columns: RowColumns
    file: IO[bytes] | None = None
    offsets: Sequence[int] = ()

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


def _merge_step(cursors: list[_RunCursor]) -> RowColumns:
    """Take the rows that precede all rows that are not loaded yet."""
    unfinished = [cursor for cursor in cursors if not cursor.complete]
    if not unfinished:
        return _joined([cursor.take(len(cursor.rows[0])) for cursor in cursors])

    earliest = min(unfinished, key=lambda cursor: cursor.rows[0][-1])
    horizon = earliest.rows[0][-1]
    counts = [int(np.searchsorted(cursor.rows[0], horizon, side="left")) for cursor in cursors]
    if not any(counts):
        earliest.load()  # a block with a single time: ties must be together to keep their order

    return _joined([cursor.take(count) for cursor, count in zip(cursors, counts, strict=True)])


def _joined(parts: list[RowColumns]) -> RowColumns:
    filled = [part for part in parts if len(part[0])] or parts[:1]
    if len(filled) == 1:
        return filled[0]

    return _sorted(tuple(np.concatenate(each) for each in zip(*filled, strict=True)))


def _sorted(columns: RowColumns) -> RowColumns:
    times = columns[0]
    if len(times) < 2 or bool((times[1:] >= times[:-1]).all()):
        return columns

    order = np.argsort(times, kind="stable")
    return tuple(column[order] for column in columns)
