"""Analysis of batches of events: groups, self time, and overlap.

Memory is bounded whatever the number of events: sums are kept per group, and rows that have to be sorted by time go
through an ExternalSorter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traceml.traces.aggregate.exact_sums import SquareSums
from traceml.traces.aggregate.nesting import SelfTimes
from traceml.traces.aggregate.numbering import PairNumbering
from traceml.traces.aggregate.overlap import OverlapTimes
from traceml.traces.aggregate.pairs import SpanMatcher, Unpaired
from traceml.traces.aggregate.sorting import ExternalSorter, RowColumns
from traceml.traces.aggregate.stats import ArgumentSums, GroupStat, GroupStatTable
from traceml.traces.aggregate.work_kinds import classify
from traceml.traces.query.event_filter import EventFilter
from traceml.traces.query.expressions import Condition, Expression, comparisons
from traceml.traces.query.fields import EventField, FieldContext, Ids, args_of, field_of, with_quoted
from traceml.traces.query.labels import metadata_names
from traceml.traces.query.measures import Measure
from traceml.traces.reader.columns import FLOAT, INTEGER, NO_TIME, EventBatch, ExactTimes, StringTable

__all__ = ["SIZES", "Analysis", "EventRole", "TraceQuery", "added"]

# Arguments with the number of bytes read or written; the first that an event has is used.
SIZES = ("size", "bytes", "nbytes", "ret")
# dftracer's fread and fwrite have one of these, the size of an element, and the number of elements that were moved.
_NUMBERS = ("count", "nmemb")
_SIZED = (*SIZES, *_NUMBERS)
_FAR_NS = 2**62  # larger times could overflow when added: they are left out of nesting
_KIND_BITS = 3  # of a begin's mark: its kind of work; the others are the outcomes of EventFilter


class EventRole:
    """Role of an event for the spans of its thread or its asynchronous id."""

    POINT, SPAN, BEGIN, END, ASYNC_BEGIN, ASYNC_END = range(6)


_ROLES = np.zeros(256, np.uint8)
_ROLES[[ord(phase) for phase in "XBEbe"]] = range(EventRole.SPAN, EventRole.ASYNC_END + 1)
_ROLES[[ord(phase) for phase in "SF"]] = EventRole.ASYNC_BEGIN, EventRole.ASYNC_END  # of older tracers


@dataclass(frozen=True, slots=True)
class TraceQuery:
    """Query about traces."""

    by: tuple[str, ...] = ("name",)  # fields to group by
    where: tuple[Expression, ...] = ()  # conditions, all of which must hold
    report: bool = False  # whether to add kinds of work, overlap, bytes and the timeline
    measures: tuple[Measure, ...] = ()  # in addition to the usual ones

    @property
    def summed(self) -> list[str]:
        """The keys of `args` that are summed."""
        return [measure.arg for measure in self.measures if measure.arg is not None]

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that distinguish groups; a report adds category and name."""
        return (*self.by, *(("cat", "name") if self.report else ()))

    @property
    def conditions(self) -> list[Condition]:
        """All comparisons in `where`."""
        return [condition for part in self.where for condition in comparisons(part)]

    @property
    def needs_labels(self) -> bool:
        """Whether conditions depend on metadata, which is then read first."""
        return any(condition.field in ("rank", "host", "file") for condition in self.conditions)

    @property
    def args(self) -> list[str]:
        """The keys of `args` that have to be read."""
        return list(dict.fromkeys([*args_of(self._used), *self.summed, *(_SIZED if self.report else ())]))

    @property
    def metadata(self) -> tuple[str, ...]:
        """The names of the metadata events that have to be read."""
        return metadata_names(self._used)

    @property
    def _used(self) -> list[str]:
        return [*self.by, *(condition.field for condition in self.conditions)]


class Analysis:
    """State of a query while batches are fed, file after file; results are available after `finish`."""

    def __init__(self, query: TraceQuery, context: FieldContext) -> None:
        self.query, self.context = query, context
        self.fields: list[EventField] = [field_of(name, context) for name in query.fields]
        self.filter = EventFilter(query.where, context)
        self.groups = [PairNumbering() for _ in self.fields]
        self.lanes, self.asynchronous, self._kinds = PairNumbering(), PairNumbering(), PairNumbering()
        self._kind_of = np.zeros(0, np.uint8)
        self._stats, self._exact_stats = GroupStatTable(), dict[int, GroupStat]()
        self._squares = SquareSums() if any(measure.needs_squares for measure in query.measures) else None
        self._arguments = {key: ArgumentSums() for key in query.summed}
        self.bytes = np.zeros(64, np.int64)
        self.nesting, self.sorter = SelfTimes(), ExternalSorter()
        self.processes, self.files, self.everything = OverlapTimes(), OverlapTimes(), OverlapTimes(timeline=True)
        self.matcher, self._source = SpanMatcher(), -1
        self.unpaired: dict[int, Unpaired] = {}
        self.phase_counts: Counter[str] = Counter()
        self.events = self.spans = 0
        self.fractional = False

    def feed(self, batch: EventBatch) -> None:
        """Add the next batch."""
        self.begin_source(batch.source)
        self.context.labels.add_metadata(batch.source, batch.metadata)
        self.fractional = self.fractional or batch.fractional
        if len(batch.ph):
            self._feed_rows(batch)

    def begin_source(self, source: int) -> None:
        """Begin a file, unless it is the current one."""
        if source != self._source:
            self._end_source()
            self._source = source

    def finish(self) -> None:
        """Close what is still open; call once, after the last batch."""
        self._end_source()
        self._sweep()
        for sums in (self.nesting, self.processes, self.files, self.everything):
            sums.finish()

    def stat(self, group: int) -> GroupStat:
        """Return the statistics of a group; complete after `finish`."""
        stat = self._stats.stat(group)
        stat.self_ns = self.nesting.self_ns(group)
        stat.squares = 0 if self._squares is None else self._squares[group]
        stat.arguments = {key: sums.of(group) for key, sums in self._arguments.items()}
        exact = self._exact_stats.get(group)
        if exact is not None:
            stat.merge(exact)

        return stat

    def has_numbers(self, key: str) -> bool:
        """Whether a span has a number under a key of `args` that is summed; also true if there are no spans."""
        stats = (self.stat(group) for group in range(len(self.groups[-1])))
        return not self.spans or any(stat.arguments[key].count for stat in stats if key in stat.arguments)

    def exact_stat(self, group: int) -> GroupStat:
        """Return the statistics of a group's spans that do not fit in GroupStatTable."""
        return self._exact_stats.setdefault(group, GroupStat())

    def labels(self, group: int) -> tuple[Any, ...]:
        """Return the labels of a group, in the order of the query's fields."""
        return tuple(field.label(value) for field, value in zip(self.fields, self._values(group), strict=True))

    def raw(self, group: int) -> tuple[Any, ...]:
        """Return the values behind the labels of a group, which are the same in every process."""
        return tuple(field.raw(value) for field, value in zip(self.fields, self._values(group), strict=True))

    def _values(self, group: int) -> list[int]:
        values = []
        for numbering in reversed(self.groups):
            group, value = numbering.pair(group)
            values.append(value)

        return values[::-1]

    def _feed_rows(self, batch: EventBatch) -> None:
        roles = _ROLES[batch.ph]
        passed = self.filter.rows(batch) if self.filter else None
        rows = self._rows(batch)
        chosen = passed
        if bool((roles == EventRole.SPAN).all()):
            self.phase_counts["X"] += len(roles)
        else:
            self._count_phases(batch)
            roles[(roles > EventRole.SPAN) & (batch.ts_ns == NO_TIME)] = EventRole.POINT  # no span without a time
            chosen = (roles == EventRole.SPAN) if passed is None else passed & (roles == EventRole.SPAN)
            self._feed_edges(batch, rows, roles)
            self._count_points(roles, passed)

        if self._arguments:
            self._feed_arguments(batch, rows.group, chosen)

        if batch.exact:
            chosen = self._feed_exact(batch.exact, rows, np.ones(len(roles), np.bool_) if chosen is None else chosen)

        self._feed_spans(rows if chosen is None or chosen.all() else rows.select(chosen))

    def _feed_arguments(self, batch: EventBatch, group: Ids, chosen: NDArray[np.bool_] | None) -> None:
        for key, sums in self._arguments.items():
            if (column := batch.args.get(key)) is None:
                continue

            column = with_quoted(column, self.context.strings)
            integers, floats = column.kinds == INTEGER, column.kinds == FLOAT
            if chosen is not None:
                integers, floats = integers & chosen, floats & chosen

            sums.add_integers(group[integers], column.integers[integers], len(self.groups[-1]))
            sums.add_floats(group[floats], column.floats[floats], len(self.groups[-1]))

    def _count_phases(self, batch: EventBatch) -> None:
        counts = np.bincount(batch.ph, minlength=256)
        for phase in np.flatnonzero(counts).tolist():
            self.phase_counts[chr(phase)] += int(counts[phase])

    def _count_points(self, roles: NDArray[np.uint8], passed: NDArray[np.bool_] | None) -> None:
        """Count events that are neither a span nor an edge of one."""
        points = roles == EventRole.POINT
        if passed is not None:
            points &= passed

        self.events += int(np.count_nonzero(points))

    def _feed_spans(self, rows: _BatchRows) -> None:
        self.events += len(rows.group)
        self.take_spans(rows.start, rows.duration, rows.group, rows.lane, rows.kind)
        if rows.size is not None:
            self.bytes = added(self.bytes, rows.group, rows.size)

    def _feed_exact(
        self, exact: Mapping[int, ExactTimes], rows: _BatchRows, chosen: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """Add the chosen spans with exact times, which are left out of nesting; return the other chosen rows."""
        for row in [row for row in exact if chosen[row]]:
            duration = exact[row][1] or 0
            chosen[row] = False
            self.events += 1
            self.spans += 1
            stat = self.exact_stat(int(rows.group[row]))
            stat.add(duration)
            stat.self_ns += max(duration, 0)

        return chosen

    def take_spans(self, *columns: NDArray[Any]) -> None:
        """Add spans: start, duration (ns), group, lane, kind of work."""
        start, duration, group = columns[0], np.maximum(columns[1], 0), columns[2]
        self.spans += len(start)
        self._stats.add(group, duration, len(self.groups[-1]))
        if self._squares is not None:
            self._squares.add(group, duration, len(self.groups[-1]))

        columns = (start, duration, *columns[2:])
        near = (start > -_FAR_NS) & (start < _FAR_NS) & (duration < _FAR_NS)  # false for NO_TIME too
        if not near.all():
            for number, time_ns in zip(group[~near].tolist(), duration[~near].tolist(), strict=True):
                self.exact_stat(number).self_ns += time_ns

            columns = _chosen(near, columns)

        self.sorter.add(*columns)

    def _feed_edges(self, batch: EventBatch, rows: _BatchRows, roles: NDArray[np.uint8]) -> None:
        edges = roles > EventRole.SPAN
        if not edges.any():
            return

        mark = rows.kind | (self.filter.outcomes(batch) << np.uint8(_KIND_BITS)) if self.filter else rows.kind
        asynchronous = self.lanes.number(-2 - batch.source, self.asynchronous.number(batch.cat, batch.id))
        lane = np.where(roles >= EventRole.ASYNC_BEGIN, asynchronous, rows.lane).astype(np.int32)
        is_end = ((roles == EventRole.END) | (roles == EventRole.ASYNC_END)).astype(np.uint8)
        self.matcher.edges.add(*_chosen(edges, (rows.start, is_end, lane, batch.name, rows.group, mark)))

    def _end_source(self) -> None:
        """Pair the begins and ends of the current file; without a report also account for its threads."""
        if self.matcher.edges.rows:
            for rows in self.matcher.spans():
                self._take_pairs(rows)

            unpaired = self.matcher.unpaired
            if unpaired != Unpaired():
                self.unpaired[self._source] = unpaired
                self.events += 0 if self.filter else unpaired.begins + unpaired.ends

            self.matcher = SpanMatcher()

        if not self.query.report:
            self._sweep()

    def _take_pairs(self, rows: RowColumns) -> None:
        *columns, mark = rows
        pairs = (*columns, mark & np.uint8((1 << _KIND_BITS) - 1))
        if self.filter:
            pairs = _chosen(self.filter.passes(mark >> np.uint8(_KIND_BITS), columns[1]), pairs)

        self.events += 2 * len(pairs[0])
        self.take_spans(*pairs)

    def _sweep(self) -> None:
        """Pass the spans, in the order of their starts, to nesting and overlap."""
        owners = np.maximum(self.lanes.pairs()[:, 0], -1) if self.query.report else None
        for start, duration, group, lane, kind in self.sorter.blocks():
            self.nesting.add(start, duration, group, lane)
            if owners is not None:
                self._add_overlap(start, duration, owners[lane], kind)

        self.sorter = ExternalSorter()

    def _add_overlap(self, *columns: NDArray[Any]) -> None:
        """Add spans to overlap: start, duration, process (-1 for asynchronous spans, which have none), kind of work."""
        start, duration, owner, kind = columns
        self.everything.add(start, duration, np.zeros(len(start), np.int32), kind)
        if owner.min() < 0:
            start, duration, owner, kind = _chosen(owner >= 0, columns)

        self.processes.add(start, duration, owner, kind)
        if len(self.context.paths) > 1:
            sources = self.context.processes.pairs()[:, 0]
            self.files.add(start, duration, sources[owner], kind)

    def _rows(self, batch: EventBatch) -> _BatchRows:
        group: Ids | int = 0
        for field, numbering in zip(self.fields, self.groups, strict=True):
            group = numbering.number(group, field.ids(batch))

        assert not isinstance(group, int)
        lane = self.lanes.number(self.context.processes.number(batch.source, batch.pid), batch.tid)
        size = _sizes(batch, self.context.strings) if self.query.report and batch.args else None
        return _BatchRows(batch.ts_ns, batch.dur_ns, group, lane, self._kind_ids(batch), size)

    def _kind_ids(self, batch: EventBatch) -> NDArray[np.uint8]:
        if not self.query.report:
            return np.zeros(len(batch.ph), np.uint8)

        numbers = self._kinds.number(batch.cat, batch.name)
        fresh = self._kinds.pairs(len(self._kind_of)).tolist()
        strings = self.context.strings
        kinds = [classify(strings[cat], strings[name]) for cat, name in fresh]
        self._kind_of = np.concatenate([self._kind_of, np.array(kinds, np.uint8)])
        return self._kind_of[numbers]


@dataclass(slots=True)
class _BatchRows:
    """Columns of a batch that an analysis needs, with its numbers of groups and lanes."""

    start: NDArray[np.int64]
    duration: NDArray[np.int64]
    group: Ids
    lane: Ids
    kind: NDArray[np.uint8]
    size: NDArray[np.int64] | None

    def select(self, mask: NDArray[np.bool_]) -> _BatchRows:
        columns = (self.start, self.duration, self.group, self.lane, self.kind)
        start, duration, group, lane, kind = _chosen(mask, columns)
        return _BatchRows(start, duration, group, lane, kind, None if self.size is None else self.size[mask])


def _chosen(mask: NDArray[np.bool_], columns: tuple[NDArray[Any], ...]) -> Any:
    return tuple(column[mask] for column in columns)


def _sizes(batch: EventBatch, strings: StringTable) -> NDArray[np.int64]:
    """Return the number of bytes in the arguments of each row, 0 without one."""
    args = {key: with_quoted(batch.args[key], strings) for key in _SIZED if key in batch.args}
    sizes = np.full(len(batch.ph), -1, np.int64)
    for key in SIZES:
        column = args.get(key)
        if column is not None:
            sizes = np.where((sizes < 0) & (column.kinds == INTEGER), column.integers, sizes)

    size, moved = args.get("size"), args.get("ret")
    if size is not None and moved is not None and (both := (size.kinds == INTEGER) & (moved.kinds == INTEGER)).any():
        asked = [both & (args[key].kinds == INTEGER) for key in _NUMBERS if key in args]
        sizes = np.where(np.logical_or.reduce(asked), size.integers * moved.integers, sizes)

    return np.maximum(sizes, 0)


def added(totals: NDArray[np.int64], group: Ids, values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return totals by group with values added; the array stays the same while it has room for all groups."""
    if not len(group):
        return totals

    top = int(group.max()) + 1
    if len(totals) < top:
        totals = np.concatenate([totals, np.zeros(2 * top - len(totals), np.int64)])

    np.add.at(totals, group, values)
    return totals
