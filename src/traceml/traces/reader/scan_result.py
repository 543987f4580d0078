"""Scanned text as columns, before its place in the file is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traceml.traces.reader.columns import ArgColumn, EventBatch, ExactTimes, FileDamage
from traceml.traces.reader.event_rows import EventRow

__all__ = ["ARG_COLUMNS", "COLUMNS", "FRONT", "ColumnBuilder", "EventColumns", "ScanFindings", "ScanResult"]

# Column and type, in the order of an EventRow.
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
# The same of an ArgColumn, in the order of an ArgValue.
ARG_COLUMNS: dict[str, Any] = {"kinds": np.uint8, "integers": np.int64, "floats": np.float64, "texts": np.int32}
FRONT = 4
"""Rows of free memory in front of columns: for events across two chunks, which are known last."""


@dataclass(slots=True)
class EventColumns:
    """Events as columns of equal length."""

    arrays: dict[str, NDArray[Any]]
    args: dict[str, ArgColumn]
    exact: dict[int, ExactTimes] = field(default_factory=dict)
    whole: EventColumns | None = None  # the same columns with the free memory in front of them, if there is any

    @classmethod
    def of_rows(cls, rows: Sequence[EventRow], keys: Sequence[str]) -> EventColumns:
        """Return rows as columns."""
        turned = list(zip(*(row[:8] for row in rows), strict=True)) or [()] * len(COLUMNS)
        arrays = {name: np.array(values, kind) for (name, kind), values in zip(COLUMNS.items(), turned, strict=True)}
        args = {}
        for place, key in enumerate(keys):
            fields = list(zip(*(row[9][place] for row in rows), strict=True)) or [()] * len(ARG_COLUMNS)
            args[key] = ArgColumn(
                *(np.array(values, kind) for values, kind in zip(fields, ARG_COLUMNS.values(), strict=True))
            )

        return cls(arrays, args, {place: row[10] for place, row in enumerate(rows) if row[10] is not None})

    @classmethod
    def joined(cls, blocks: Sequence[EventColumns]) -> EventColumns:
        """Return blocks, at least one, as one."""
        if len(blocks) == 1:
            return blocks[0]

        arrays = {name: np.concatenate([block.arrays[name] for block in blocks]) for name in COLUMNS}
        args = {
            key: ArgColumn(
                *(np.concatenate([getattr(block.args[key], name) for block in blocks]) for name in ARG_COLUMNS)
            )
            for key in blocks[0].args
        }
        exact, before = dict[int, ExactTimes](), 0
        for block in blocks:
            exact |= {before + row: times for row, times in block.exact.items()}
            before += len(block)

        return cls(arrays, args, exact)

    def __len__(self) -> int:
        return len(self.arrays["ph"])

    def behind(self, rows: int) -> EventColumns:
        """Return the columns without the first rows, whose memory is free from now on."""
        arrays = {name: column[rows:] for name, column in self.arrays.items()}
        args = {key: ArgColumn(*(getattr(arg, name)[rows:] for name in ARG_COLUMNS)) for key, arg in self.args.items()}
        return EventColumns(arrays, args, whole=self)

    def after(self, head: EventColumns) -> EventColumns:
        """Return the columns with others in front of them: in the free memory there, else as a copy."""
        first = -1 if self.whole is None else len(self.whole) - len(self) - len(head)
        if self.whole is None or first < 0 or head.exact or self.exact:
            return EventColumns.joined([head, self])

        found = self.whole.behind(first)
        for into, column in zip(found._columns(), head._columns(), strict=True):
            into[: len(head)] = column

        return found

    def put(self, place: int, row: EventRow) -> None:
        """Overwrite a row."""
        for name, value in zip(COLUMNS, row[:8], strict=True):
            self.arrays[name][place] = value

        for arg, values in zip(self.args.values(), row[9], strict=True):
            arg.kinds[place], arg.integers[place], arg.floats[place], arg.texts[place] = values

        if row[10] is not None:
            self.exact[place] = row[10]

    def without(self, rows: list[int]) -> EventColumns:
        """Return the columns without some rows."""
        keep = np.ones(len(self), np.bool_)
        keep[rows] = False
        return EventColumns(
            {name: column[keep] for name, column in self.arrays.items()},
            {key: ArgColumn(*(getattr(arg, name)[keep] for name in ARG_COLUMNS)) for key, arg in self.args.items()},
            {int(np.count_nonzero(keep[:row])): times for row, times in self.exact.items()},
        )

    def _columns(self) -> Iterator[NDArray[Any]]:
        yield from self.arrays.values()
        for arg in self.args.values():
            yield from (getattr(arg, name) for name in ARG_COLUMNS)


class ColumnBuilder:
    """Collects rows and blocks of columns, in order."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._keys = keys
        self._blocks: list[EventColumns] = []
        self._rows: list[EventRow] = []

    def add_row(self, row: EventRow) -> None:
        """Append a row."""
        self._rows.append(row)

    def add_block(self, block: EventColumns) -> None:
        """Append a block of columns."""
        if len(block):
            self._close_rows()
            self._blocks.append(block)

    def columns(self) -> EventColumns:
        """Return everything collected as one block."""
        self._close_rows()
        return EventColumns.joined(self._blocks or [EventColumns.of_rows([], self._keys)])

    def _close_rows(self) -> None:
        if self._rows:
            self._blocks.append(EventColumns.of_rows(self._rows, self._keys))
            self._rows = []


@dataclass(slots=True)
class ScanFindings:
    """Results of a scan other than rows."""

    fractional: bool = False  # as in EventBatch
    metadata: list[dict[str, Any]] = field(default_factory=list)  # likewise
    damage: list[FileDamage] = field(default_factory=list)  # skipped ranges; offsets from the beginning of the text
    closed: bool = False  # the array of events ended
    searching: bool = False  # the scan reached the end of the text while it looked for the next event after damage
    stop: int = 0  # end of the text that was used; the rest belongs in front of the next chunk


@dataclass(slots=True)
class ScanResult:
    """Events and other findings of a scan."""

    columns: EventColumns
    findings: ScanFindings

    @property
    def events(self) -> int:
        """Number of events, metadata excluded."""
        return len(self.columns)

    def after(self, head: ScanResult) -> ScanResult:
        """Return this result with the events of the text before it in front; `head` has no damage."""
        before, own = head.findings, self.findings
        fractional = before.fractional or own.fractional
        findings = replace(own, fractional=fractional, metadata=before.metadata + own.metadata)
        return ScanResult(self.columns.after(head.columns), findings)

    def batch(self, source: int) -> EventBatch:
        """Return the events as a batch of a file."""
        findings = self.findings
        return EventBatch(
            source=source,
            **self.columns.arrays,
            args=self.columns.args,
            fractional=findings.fractional,
            exact=self.columns.exact,
            metadata=findings.metadata,
        )
