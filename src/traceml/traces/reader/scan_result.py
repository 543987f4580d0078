"""Scanned text as columns, before it is known where in the file it belongs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traceml.traces.reader.columns import ArgColumn, EventBatch, FileDamage
from traceml.traces.reader.event_rows import EventRow

__all__ = ["ARG_COLUMNS", "COLUMNS", "Columns", "ScanFindings", "ScanResult", "joined", "joined_args", "table_of"]

# Column and type, in the order of an events.EventRow.
COLUMNS: dict[str, Any] = {
    "ph": np.uint8,
    "name": np.int32,
    "cat": np.int32,
    "pid": np.int32,
    "tid": np.int32,
    "id": np.int32,
    "ts_ns": np.int64,
    "dur_ns": np.int64,
}
# The same of an ArgColumn, in the order of an events.ArgValue.
ARG_COLUMNS: dict[str, Any] = {"kinds": np.uint8, "integers": np.int64, "floats": np.float64, "texts": np.int32}

Columns = dict[str, NDArray[Any]]


@dataclass(slots=True)
class ScanFindings:
    """What a scan found beside the rows.

    Args:
        fractional, odd, odd_rows, meta: as in EventBatch.
        damage: parts that were passed over; offsets count from the beginning of the text.
        stop: up to where the text is done with; what follows belongs in front of the next chunk.
        closed: the array of events has ended.
        lost: the end was reached in search of a place where events go on.
    """

    fractional: bool = False
    odd: list[dict[str, Any]] = field(default_factory=list)
    odd_rows: list[int] = field(default_factory=list)
    meta: list[dict[str, Any]] = field(default_factory=list)
    damage: list[FileDamage] = field(default_factory=list)
    closed: bool = False
    lost: bool = False
    stop: int = 0


@dataclass(slots=True)
class ScanResult:
    """What a scan of some text found: rows as the array columns of EventBatch, and the rest."""

    columns: Columns
    args: dict[str, ArgColumn]
    found: ScanFindings

    @property
    def events(self) -> int:
        """How many events it holds."""
        return len(self.columns["ph"]) + len(self.found.odd)

    def batch(self, source: int, sequence: int) -> EventBatch:
        """Return it as users get it."""
        return EventBatch(
            source=source,
            sequence=sequence,
            **self.columns,
            args=self.args,
            fractional=self.found.fractional,
            odd=self.found.odd,
            odd_rows=self.found.odd_rows,
            meta=self.found.meta,
        )


def table_of(rows: list[EventRow], keys: tuple[str, ...]) -> tuple[Columns, dict[str, ArgColumn]]:
    """Return rows as columns."""
    turned = list(zip(*(row[:8] for row in rows), strict=True)) or [()] * len(COLUMNS)
    columns = {name: np.array(values, kind) for (name, kind), values in zip(COLUMNS.items(), turned, strict=True)}
    args = {}
    for place, key in enumerate(keys):
        fields = list(zip(*(row[9][place] for row in rows), strict=True)) or [()] * len(ARG_COLUMNS)
        args[key] = ArgColumn(
            *(np.array(values, kind) for values, kind in zip(fields, ARG_COLUMNS.values(), strict=True))
        )

    return columns, args


def joined(first: ScanResult, second: ScanResult) -> ScanResult:
    """Return two pieces as one; where the text ends is said by the second, damage of both is the caller's."""
    before, head, tail = len(first.columns["ph"]), first.found, second.found
    found = ScanFindings(
        fractional=head.fractional or tail.fractional,
        odd=head.odd + tail.odd,
        odd_rows=head.odd_rows + [before + row for row in tail.odd_rows],
        meta=head.meta + tail.meta,
        closed=tail.closed,
        lost=tail.lost,
        stop=tail.stop,
    )
    columns = {name: np.concatenate([first.columns[name], second.columns[name]]) for name in COLUMNS}
    return ScanResult(columns, {key: joined_args([first.args[key], second.args[key]]) for key in first.args}, found)


def joined_args(parts: list[ArgColumn]) -> ArgColumn:
    """Return columns one after another."""
    return ArgColumn(*(np.concatenate([getattr(part, name) for part in parts]) for name in ARG_COLUMNS))
