"""Samples of processes, hosts and devices: rows over time, bounded per rank, and exact totals of all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traceml.database.row_arrays import join_rows
from traceml.database.schema import GPU, HOST, PROCESS, TORCH_MEMORY, Table
from traceml.database.store.summaries import TableSums

__all__ = ["SampleTotals", "Samples", "rows_for"]

_MAX_ROWS = 4096
_MIN_ROWS = 256
# 23 MB of the largest table.
_MAX_ROWS_OF_ALL = 1 << 18
Floats = NDArray[np.float64]
# What the report says of each table, and the column that numbers the devices of a rank.
_COLUMNS: Mapping[str, tuple[str, ...]] = {
    PROCESS.name: ("rss_bytes",),
    TORCH_MEMORY.name: ("peak_allocated_bytes",),
    HOST.name: ("cpu_pct", "memory_used_bytes", "memory_total_bytes"),
    GPU.name: ("utilization_pct", "memory_used_bytes", "memory_total_bytes", "temperature_c", "power_w"),
}
_DEVICES = {TORCH_MEMORY.name: "device", GPU.name: "index"}
_MAX_DEVICES = 1 << 16


def rows_for(ranks: int) -> int:
    """Return the number of samples to keep of each rank: 4,096 of a few ranks, 256 of a thousand."""
    return max(_MIN_ROWS, min(_MAX_ROWS, _MAX_ROWS_OF_ALL // max(ranks, 1)))


class Samples:
    """Rows of sampled tables by rank, a bounded number of each.

    Beyond that, of the older half those at even distances are kept, so that a long run is covered from its beginning.

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
        """Return the rows of a rank, None if there are none."""
        key = (table, rank)
        if waiting := self._new.pop(key, None):
            parts = [self._rows[key], *waiting] if key in self._rows else waiting
            self._rows[key] = self._thinned(join_rows(parts))
            self._waiting[key] = 0

        return self._rows.get(key)

    def last(self, table: str, rank: int) -> Any:
        """Return the newest row of a rank, None if there is none."""
        rows = self.of(table, rank)
        return None if rows is None or not len(rows) else rows[-1]

    def ranks(self, table: str) -> list[int]:
        """Return the ranks that have rows of a table."""
        return sorted({rank for name, rank in (*self._rows, *self._new) if name == table})

    def _thinned(self, rows: NDArray[np.void]) -> NDArray[np.void]:
        if len(rows) <= self.max_rows:
            return rows

        older, newer = np.split(rows, [-(self.max_rows // 2)])
        times = np.unique(older["t_ns"])  # the devices of a rank share the time of a sample
        kept = max(self.max_rows // 4 * len(times) // len(older), 1)
        wanted = np.linspace(times[0], times[-1], kept)
        return join_rows([older[np.isin(older["t_ns"], times[np.searchsorted(times, wanted)])], newer])


class SampleTotals:
    """Greatest value and mean of sampled columns by rank and device."""

    tables = frozenset(_COLUMNS)
    """Names of the tables that are summed."""

    def __init__(self) -> None:
        # table -> rank -> device -> (greatest value, sum, number of values) x column
        self._found: dict[str, dict[int, dict[int, Floats]]] = {}

    def start(self, table: Table, rank: int, sums: TableSums) -> None:
        """Take the sums of all samples of a rank so far."""
        columns, names = _COLUMNS.get(table.name, ()), sums.bins.dtype.names or ()
        for record in sums.bins if columns else ():
            most, whole = [record[f"{name}_max"] for name in columns], [record[name] for name in columns]
            counts = [record[f"{name}_rows" if f"{name}_rows" in names else "rows"] for name in columns]
            self._add(table, rank, int(record["group"]), np.array([most, whole, counts], np.float64))

    def take(self, table: Table, ranks: NDArray[np.int64], rows: NDArray[np.void]) -> None:
        """Take further samples of many ranks, in any order.

        Args:
            table: their table; those that the report does not use are ignored.
        """
        columns = _COLUMNS.get(table.name, ())
        if not columns or not len(rows):
            return

        devices = rows[_DEVICES[table.name]] if table.name in _DEVICES else np.zeros(len(rows), np.int64)
        keys = ranks * _MAX_DEVICES + devices
        order = np.argsort(keys, kind="stable")
        found, starts = np.unique(keys[order], return_index=True)
        values = np.stack([rows[name][order].astype(np.float64) for name in columns])
        parts = (
            np.fmax.reduceat(values, starts, axis=1),
            np.add.reduceat(np.nan_to_num(values), starts, axis=1),
            np.add.reduceat(~np.isnan(values), starts, axis=1, dtype=np.int64),
        )
        for key, new in zip(found.tolist(), np.stack(parts).transpose(2, 0, 1), strict=True):
            self._add(table, key // _MAX_DEVICES, key % _MAX_DEVICES, new)

    def most(self, table: Table, rank: int, column: str, device: int | None = None) -> float | None:
        """Return the greatest value of a column, of one or of all devices of a rank; None without samples."""
        at, found = _COLUMNS[table.name].index(column), self._devices(table, rank)
        chosen = found.values() if device is None else [found[device]] if device in found else []
        return max((float(each[0, at]) for each in chosen if not np.isnan(each[0, at])), default=None)

    def mean(self, table: Table, rank: int, column: str, device: int = 0) -> float | None:
        """Return the mean of a column of a rank's device; None without samples."""
        at, found = _COLUMNS[table.name].index(column), self._devices(table, rank).get(device)
        return float(found[1, at] / found[2, at]) if found is not None and found[2, at] else None

    def ranks(self, table: Table) -> list[int]:
        """Return the ranks that have samples."""
        return sorted(self._found.get(table.name, ()))

    def devices(self, table: Table, rank: int) -> list[int]:
        """Return the devices of a rank that have samples."""
        return sorted(self._devices(table, rank))

    def _devices(self, table: Table, rank: int) -> dict[int, Floats]:
        return self._found.get(table.name, {}).get(rank, {})

    def _add(self, table: Table, rank: int, device: int, new: Floats) -> None:
        devices = self._found.setdefault(table.name, {}).setdefault(rank, {})
        known = devices.get(device)
        devices[device] = new if known is None else np.concatenate([np.fmax(known[:1], new[:1]), known[1:] + new[1:]])
