"""Rows of dftracer that stand for many calls: their number and the sum of their durations, by group.

A trace has them only if it was made with DFTRACER_ENABLE_AGGREGATION=1. Their arguments are read in a second pass, so
that other traces do not pay for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from traceml.traces.query.analysis import TraceQuery
from traceml.traces.query.event_filter import EventFilter
from traceml.traces.query.fields import FieldContext, field_of
from traceml.traces.query.labels import Labels
from traceml.traces.reader.columns import FLOAT, INTEGER, ArgColumn, EventBatch
from traceml.traces.reader.event_rows import AGGREGATED
from traceml.traces.reader.reading import read

__all__ = ["aggregated_calls"]

_COUNT, _SUM = "dft_cnt", "dur_sum"


@dataclass(slots=True)
class _Calls:
    rows: int = 0
    count: int = 0
    timed: int = 0  # calls whose durations are known
    sum_us: float = 0

    def add(self, count: int | None, sum_us: float | None) -> None:
        """Add a row; without a number of calls it is counted as a row only."""
        self.rows += 1
        if count is not None:
            self.count += count
            if sum_us is not None:
                self.timed += count
                self.sum_us += sum_us

    def row(self) -> dict[str, Any]:
        """Return the numbers; times are None if no row has them."""
        mean_us = self.sum_us / self.timed if self.timed else None
        return {
            "rows": self.rows,
            "count": self.count,
            "sum_us": self.sum_us if self.timed else None,
            "mean_us": mean_us,
        }


def aggregated_calls(query: TraceQuery, files: Sequence[Path], labels: Labels) -> dict[str, Any]:
    """Return the calls behind aggregated rows that pass the conditions: in all, and by group, the largest sum first.

    Args:
        query: its `by` and `where` count.
    """
    groups: dict[tuple[Any, ...], _Calls] = {}
    whole = _Calls()
    for group, count, sum_us in _rows(query, files, labels):
        for calls in (whole, groups.setdefault(group, _Calls())):
            calls.add(count, sum_us)

    order = sorted(groups.items(), key=lambda item: (-item[1].sum_us, [str(label) for label in item[0]]))
    return {**whole.row(), "groups": [dict(zip(query.by, group, strict=True)) | calls.row() for group, calls in order]}


def _rows(
    query: TraceQuery, files: Sequence[Path], labels: Labels
) -> Iterator[tuple[tuple[Any, ...], int | None, float | None]]:
    """Yield group, number of calls and the sum of their durations (us) of each aggregated row."""
    reader = read(files, args=[*query.args, _COUNT, _SUM], metadata=())
    context = FieldContext(reader.strings, files, labels)
    chosen, fields = EventFilter(query.where, context), [field_of(name, context) for name in query.by]
    for batch in reader:
        mask = batch.ph == ord(AGGREGATED)
        if not mask.any():
            continue

        if chosen:
            mask &= chosen.rows(batch, np.full(len(batch.ph), -1, np.int64))

        ids = [field.ids(batch) for field in fields]
        for row in np.flatnonzero(mask).tolist():
            group = tuple(field.label(int(numbers[row])) for field, numbers in zip(fields, ids, strict=True))
            count = _value(batch, _COUNT, row)
            yield group, None if count is None else int(count), _value(batch, _SUM, row)


def _value(batch: EventBatch, key: str, row: int) -> int | float | None:
    column: ArgColumn | None = batch.args.get(key)
    if column is None:
        return None

    found = {INTEGER: column.integers, FLOAT: column.floats}.get(int(column.kinds[row]))
    return None if found is None else found[row].item()
