"""Samples of processes, hosts and devices over time, bounded per rank."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from traceml.database.row_arrays import join_rows

__all__ = ["Samples", "rows_for"]

_MAX_ROWS = 4096
_MIN_ROWS = 256
# 23 MB of the largest table.
_MAX_ROWS_OF_ALL = 1 << 18


def rows_for(ranks: int) -> int:
    """Return the number of samples to keep of each rank: 4,096 of a few ranks, 256 of a thousand."""
    return max(_MIN_ROWS, min(_MAX_ROWS, _MAX_ROWS_OF_ALL // max(ranks, 1)))


class Samples:
    """Rows of sampled tables by rank, a bounded number of each.

    Beyond that, every second row of the older half is dropped, so that a long run is covered from its beginning.

    Attributes:
        max_rows: rows kept of each rank and table; see `rows_for`.
    """

    def __init__(self) -> None:
        self.max_rows = _MAX_ROWS
        self._rows: dict[tuple[str, int], NDArray[np.void]] = {}
        self._new: dict[tuple[str, int], list[NDArray[np.void]]] = {}
        self._waiting: dict[tuple[str, int], int] = {}

    def add(self, table: str, rank: int, rows: NDArray[np.void]) -> None:
        """Take rows of a rank, in order."""
        key = (table, rank)
        self._new.setdefault(key, []).append(rows)
        self._waiting[key] = self._waiting.get(key, 0) + len(rows)
        if self._waiting[key] > self.max_rows:
            self.of(table, rank)

    def of(self, table: str, rank: int) -> NDArray[np.void] | None:
        """Return the rows of a rank, None where there are none."""
        key = (table, rank)
        if waiting := self._new.pop(key, None):
            parts = [self._rows[key], *waiting] if key in self._rows else waiting
            self._rows[key] = self._thinned(join_rows(parts))
            self._waiting[key] = 0

        return self._rows.get(key)

    def last(self, table: str, rank: int) -> Any:
        """Return the newest row of a rank, None where there is none."""
        rows = self.of(table, rank)
        return None if rows is None or not len(rows) else rows[-1]

    def ranks(self, table: str) -> list[int]:
        """Return the ranks that have rows of a table."""
        return sorted({rank for name, rank in (*self._rows, *self._new) if name == table})

    def _thinned(self, rows: NDArray[np.void]) -> NDArray[np.void]:
        while len(rows) > self.max_rows:
            older = len(rows) // 2
            rows = join_rows([rows[:older:2], rows[older:]])

        return rows
