"""Exact sums of a run's rows, of constant size, so that a report needs few rows of a run of any length.

The rows of one table of one stream are summed in at most 64 bins of equal width in steps: bin = step // width. The
width is a power of two and doubles when a step does not fit, so that sums of other rows, ranks or runs can be joined
without loss. Sampled tables have one bin, per device.

A bin is a row of fixed fields, generated from the table's columns: `bin`, `group`, `rows`, `begin_ns` and `end_ns` (the
monotonic time it covers), in tables of steps `first_step` and `last_step`, and

- the sum of each measured column, under the column's own name; of columns that may be missing in a row (floats that are
  NaN, `backward_own_ns` below zero) also `<column>_rows`, the number of rows that have it;
- of sampled tables `<column>_min` and `<column>_max`; of `steps` `total_ns_min` and `total_ns_max`.

`group` separates rows that must not be mixed: in `steps` 1 for rows whose device times follow in `device_steps`, else
0; in `user_phases` the `name_id`; in `gpu` and `torch_memory` the device; in `limits` the resource; in
`loader_workers` the loader; in `epochs` 1 for the first step of the process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import msgpack
import msgspec
import numpy as np
from numpy.typing import NDArray

from traceml.database.row_arrays import join_rows
from traceml.database.schema import (
    DEVICE_STEPS,
    EPOCHS,
    EVALS,
    GPU,
    LIMITS,
    LOADER_WORKERS,
    STEPS,
    TORCH_MEMORY,
    USER_PHASES,
    Column,
    StepFlag,
    Table,
    unpack_bits,
)
from traceml.database.store.frame_compression import decode, encode

__all__ = [
    "LEVELS",
    "MAX_BINS",
    "STEP_TABLES",
    "StepSums",
    "TableSums",
    "bin_width",
    "level_middle_ns",
    "level_of",
    "sum_rows",
]

MAX_BINS = 64
STEP_TABLES = (STEPS, DEVICE_STEPS, USER_PHASES, EVALS, EPOCHS)
"""Tables that are summed by step; `SAMPLED_TABLES` are summed over the whole run."""

# Ratio between two levels of the histogram of step times, which bounds the error of percentiles.
_LEVEL_RATIO = 1.015
_MIN_NS = 1e3
LEVELS = 1480
"""Number of levels of the histogram of step times: from a microsecond to more than an hour."""

_GROUPS = {
    USER_PHASES.name: "name_id", GPU.name: "index", TORCH_MEMORY.name: "device", LIMITS.name: "resource",
    LOADER_WORKERS.name: "loader", EPOCHS.name: "first",
}  # fmt: skip
_NEGATIVE_IS_MISSING = frozenset({"backward_own_ns"})
_NOT_SUMMED = frozenset({"step", "t_end_ns", "t_ns", "bits"})
_KEYS = ("bin", "group")
_BY_STEP = frozenset(table.name for table in STEP_TABLES)
_LARGEST = np.iinfo(np.int64).max

_Rows = NDArray[np.void]
_Values = Callable[[_Rows], NDArray[Any]]


class _Field(msgspec.Struct, frozen=True):
    """One field of a bin, and its values for single rows."""

    name: str
    code: str
    of: _Values


@cache
def _fields(table: str, columns: tuple[str, ...], floats: frozenset[str]) -> tuple[_Field, ...]:
    """Return the fields of a table's bins after `bin` and `group`, in order."""
    fields = [_Field("rows", "q", lambda rows: np.ones(len(rows), np.int64))]
    is_sampled = table not in _BY_STEP
    if not is_sampled and "step" in columns:
        fields += [_Field("first_step", "q", _column("step")), _Field("last_step", "q", _column("step"))]

    fields += _times(columns)
    for name in columns:
        if name not in _NOT_SUMMED and name != _GROUPS.get(table):
            fields += _sums(name, is_float=name in floats, is_sampled=is_sampled)
            if is_sampled or (table == STEPS.name and name == "total_ns"):
                code = "d" if name in floats else "q"
                fields += [_Field(f"{name}_{end}", code, _column(name)) for end in ("min", "max")]

    return tuple(fields)


def _times(columns: tuple[str, ...]) -> list[_Field]:
    if "t_ns" in columns:
        return [_Field("begin_ns", "q", _column("t_ns")), _Field("end_ns", "q", _column("t_ns"))]
    if "t_end_ns" not in columns:
        return []

    duration = "total_ns" if "total_ns" in columns else "ns"
    return [
        _Field("begin_ns", "q", lambda rows: rows["t_end_ns"] - rows[duration]),
        _Field("end_ns", "q", _column("t_end_ns")),
    ]


def _sums(name: str, *, is_float: bool, is_sampled: bool) -> list[_Field]:
    # Counters of bytes since boot, summed over a month of samples, exceed an int64.
    code = "d" if is_float or is_sampled else "q"
    if not is_float and name not in _NEGATIVE_IS_MISSING:
        return [_Field(name, code, _column(name))]

    return [
        _Field(name, code, lambda rows: np.where(_present(rows, name), rows[name], 0)),
        _Field(f"{name}_rows", "q", lambda rows: _present(rows, name).astype(np.int64)),
    ]


def _column(name: str) -> _Values:
    return lambda rows: rows[name]


def _present(rows: _Rows, name: str) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = rows[name] >= 0 if name in _NEGATIVE_IS_MISSING else ~np.isnan(rows[name])
    return found


class TableSums(msgspec.Struct, frozen=True, eq=False):
    """Sums of a table's rows of one stream, or of several that were joined."""

    table: str
    width: int  # steps per bin, a power of two; 1 for tables without steps
    bins: NDArray[np.void]  # the bins that have rows, ordered by `bin` and `group`; see the module for their fields
    levels: NDArray[np.int64]  # of `steps`, (level, rows) of the histogram of step times, ordered; else empty

    @classmethod
    @cache
    def empty(cls, table: Table) -> TableSums:
        """Return the sums of no rows."""
        return cls(table.name, 1, _records(table.name, np.empty(0, table.dtype)), _NO_LEVELS)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.bins["rows"].sum())

    def join(self, *others: TableSums) -> TableSums:
        """Return the sums of these rows and those of others of the same table."""
        parts = [each for each in (self, *others) if len(each.bins)]
        if len(parts) < 2:
            return parts[0] if parts else self

        width = max(part.width for part in parts)
        if "first_step" in (self.bins.dtype.names or ()):
            first = min(int(part.bins["first_step"].min()) for part in parts)
            last = max(int(part.bins["last_step"].max()) for part in parts)
            width = bin_width(first, last, width)

        bins = _joined_arrays([part.widened(width).bins for part in parts])
        levels = np.concatenate([part.levels for part in parts])
        return TableSums(self.table, width, _collapsed(bins)[0], _counted(levels[:, 0], levels[:, 1]))

    def widened(self, width: int) -> TableSums:
        """Return the same sums in bins of another width, a power of two not below the present one."""
        if width == self.width:
            return self

        bins = self.bins.copy()
        bins["bin"] //= width // self.width
        return TableSums(self.table, width, _collapsed(bins)[0], self.levels)

    def encoded(self) -> bytes:
        """Return the form in the store."""
        layout = _layout(self.bins.dtype)
        codec, bins = encode(layout, self.bins.tobytes())
        return bytes(msgpack.packb([self.width, layout.layout, int(codec), bins, self.levels.astype("<u4").tobytes()]))

    @classmethod
    def decoded(cls, table: str, data: bytes) -> TableSums:
        """Reverse `encoded`.

        Raises:
            ValueError: the bytes are damaged.
        """
        try:
            width, columns, codec, packed, levels = msgpack.unpackb(data)
            dtype = np.dtype([(name, "<i8" if code == "q" else "<f8") for name, code in columns])
            bins = np.frombuffer(decode(codec, packed, dtype.itemsize), dtype)
            counted = np.frombuffer(levels, "<u4").reshape(-1, 2).astype(np.int64)
        except (TypeError, ValueError, msgpack.UnpackException) as error:
            raise ValueError(f"sums of {table}: {error}") from error

        return cls(table, int(width), bins, counted)


class StepSums(msgspec.Struct, frozen=True, eq=False):
    """Sums of all steps of one stream, or of several that were joined; each table has its own width.

    A phase that the device times (see `schema.DEVICE_PHASES`) has its CPU time in `steps`: in group 1 this is only the
    launch, and the device's time is in `device_steps`.

    The groups of `user_phases` are numbers of names, which each stream gives by itself: join them by name.
    """

    steps: TableSums
    device_steps: TableSums
    user_phases: TableSums
    evals: TableSums
    epochs: TableSums

    @classmethod
    def of(cls, sums: Mapping[str, TableSums]) -> StepSums:
        """Return the sums of one stream, by table; a table without sums has no rows."""
        return cls(*(sums.get(table.name) or TableSums.empty(table) for table in STEP_TABLES))

    @classmethod
    def by_stream(cls, tables: Mapping[str, Mapping[int, TableSums]]) -> dict[int, StepSums]:
        """Return the sums of each stream, ascending, from those of each table by stream."""
        return {
            stream: cls.of({name: sums[stream] for name, sums in tables.items() if stream in sums})
            for stream in sorted({stream for sums in tables.values() for stream in sums})
        }

    @property
    def count(self) -> int:
        """Number of step rows."""
        return self.steps.rows

    def join(self, *others: StepSums) -> StepSums:
        """Return the sums of these steps and those of others, for example of all ranks."""
        columns = zip(*(msgspec.structs.astuple(each) for each in (self, *others)), strict=True)
        return StepSums(*(first.join(*rest) for first, *rest in columns))

    def quantiles_ns(self, shares: Sequence[float]) -> list[float]:
        """Return quantiles of the step times of the whole run, accurate to 0.75 %; NaN without steps."""
        levels, rows = self.steps.levels.T
        if not len(levels):
            return [float("nan")] * len(shares)

        reached = np.cumsum(rows)
        bins = self.steps.bins
        least, most = int(bins["total_ns_min"].min()), int(bins["total_ns_max"].max())
        at = [int(np.searchsorted(reached, max(np.ceil(share * reached[-1]), 1))) for share in shares]
        return [float(value) for value in np.clip(level_middle_ns(levels[at]), least, most)]


def level_of(ns: NDArray[Any]) -> NDArray[np.int64]:
    """Return the level of each step time in the histogram."""
    levels = np.log(np.maximum(ns, _MIN_NS) / _MIN_NS) / np.log(_LEVEL_RATIO)
    found: NDArray[np.int64] = np.minimum(levels, LEVELS - 1).astype(np.int64)
    return found


def level_middle_ns(level: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the step time in the middle of each level."""
    middle: NDArray[np.float64] = np.exp(np.log(_LEVEL_RATIO) * (level + 0.5)) * _MIN_NS
    return middle


def sum_rows(table: str, rows: NDArray[np.void], streams: NDArray[np.int64] | None = None) -> dict[int, TableSums]:
    """Sum rows of a table by stream.

    Args:
        rows: the rows, with the columns of the table or of an older version of it.
        streams: stream of each row; by default all are of stream 0.

    Returns:
        the sums by stream; a stream without rows is missing.
    """
    if not len(rows):
        return {}

    numbers, of_row = (
        (np.zeros(1, np.int64), np.zeros(len(rows), np.int64))
        if streams is None
        else np.unique(streams, return_inverse=True)
    )
    records, widths = _records(table, rows), np.ones(len(numbers), np.int64)
    if table in _BY_STEP and "step" in (rows.dtype.names or ()):
        widths = _widths(rows["step"], of_row, len(numbers))
        records["bin"] = rows["step"] // widths[of_row]

    bins, of_bin = _collapsed(records, of_row)
    ends = np.searchsorted(of_bin, np.arange(len(numbers) + 1))
    levels = _levels_by_stream(rows, of_row, len(numbers)) if table == STEPS.name else [_NO_LEVELS] * len(numbers)
    return {
        number: TableSums(table, int(widths[at]), bins[ends[at] : ends[at + 1]], levels[at])
        for at, number in enumerate(numbers.tolist())
    }


_NO_LEVELS: NDArray[np.int64] = np.empty((0, 2), np.int64)


def _layout(dtype: np.dtype[Any]) -> Table:
    """Return a bin's layout as a packed table, by whose rows bins are compressed."""
    codes = ((name, "q" if dtype[name].kind == "i" else "d") for name in dtype.names or ())
    return Table("bins", tuple(Column(name, code, "") for name, code in codes), 0)


def _fields_of(table: str, dtype: np.dtype[Any]) -> tuple[_Field, ...]:
    names = dtype.names or ()
    return _fields(table, names, frozenset(name for name in names if dtype[name].kind == "f"))


def _join_of(field: str) -> np.ufunc:
    """Return how values of a field are joined."""
    if field.startswith(("first_", "begin_")) or field.endswith("_min"):
        return np.fmin
    if field.startswith(("last_", "end_")) or field.endswith("_max"):
        return np.fmax

    return np.add


def _records(table: str, rows: _Rows) -> _Rows:
    """Return each row as a bin of its own; the bin's number is still zero."""
    fields = _fields_of(table, rows.dtype)
    dtype = np.dtype([(name, "<i8") for name in _KEYS] + [(f.name, "<i8" if f.code == "q" else "<f8") for f in fields])
    records = np.zeros(len(rows), dtype)
    names = rows.dtype.names or ()
    if (group := _GROUPS.get(table)) in names:
        records["group"] = rows[group]
    elif table == STEPS.name and "bits" in names:
        records["group"] = unpack_bits(rows["bits"]).flags & StepFlag.DEVICE > 0

    for field in fields:
        records[field.name] = field.of(rows)

    return records


def _collapsed(bins: _Rows, stream: NDArray[np.int64] | None = None) -> tuple[_Rows, NDArray[np.int64]]:
    """Join bins of equal number, group and stream; return them in order, and their streams."""
    streams = np.zeros(len(bins), np.int64) if stream is None else stream
    order = np.lexsort((bins["group"], bins["bin"], streams))
    if np.any(order[1:] < order[:-1]):  # rows of one stream come in order: copying them would take half the time
        bins, streams = bins[order], streams[order]

    keys = (streams, bins["bin"], bins["group"])
    is_first = np.ones(len(bins), bool)
    is_first[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    starts = np.flatnonzero(is_first)
    joined = bins[starts]
    if len(starts) < len(bins):
        for name in set(bins.dtype.names or ()).difference(_KEYS):
            joined[name] = _join_of(name).reduceat(bins[name], starts)

    return joined, streams[starts]


def _joined_arrays(parts: Sequence[_Rows]) -> _Rows:
    """Concatenate bins; where the tables had other columns, missing fields are zero."""
    if len({part.dtype for part in parts}) == 1:
        return join_rows(parts)

    dtype = np.dtype(
        list({name: (name, part.dtype[name].str) for part in parts for name in part.dtype.names or ()}.values())
    )
    joined = np.zeros(sum(len(part) for part in parts), dtype)
    at = 0
    for part in parts:
        for name in part.dtype.names or ():
            joined[name][at : at + len(part)] = part[name]

        at += len(part)

    return joined


def bin_width(first: int, last: int, least: int = 1) -> int:
    """Return the smallest width, at least `least`, with which all steps between two fit."""
    width = max(least, 1 << max((last - first) // MAX_BINS, 1).bit_length() - 1)
    while last // width - first // width >= MAX_BINS:
        width *= 2

    return width


def _widths(steps: NDArray[np.int64], stream: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    first, last = np.full(count, _LARGEST), np.full(count, -_LARGEST)
    np.minimum.at(first, stream, steps)
    np.maximum.at(last, stream, steps)
    return np.array([bin_width(*ends) for ends in zip(first.tolist(), last.tolist(), strict=True)], np.int64)


def _levels_by_stream(rows: _Rows, stream: NDArray[np.int64], count: int) -> list[NDArray[np.int64]]:
    found = _counted(stream * LEVELS + level_of(rows["total_ns"]))
    ends = np.searchsorted(found[:, 0], np.arange(count + 1) * LEVELS)
    found[:, 0] %= LEVELS
    return np.split(found, ends[1:-1])


def _counted(keys: NDArray[np.int64], counts: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """Return (key, count) for each key, ordered."""
    if counts is None:
        return np.stack(np.unique(keys, return_counts=True), axis=1).astype(np.int64)

    found, at = np.unique(keys, return_inverse=True)
    total = np.zeros(len(found), np.int64)
    np.add.at(total, at, counts)
    return np.stack((found, total), axis=1)
