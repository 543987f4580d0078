"""Analysis of a part of the events, as plain data for another process, which merges it.

Sums are merged. Rows that have to be sorted by time (spans for self time and overlap, begins and ends for pairs) travel
as columns. Numbers of groups, threads and names are valid in one process only, so their labels are included.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traceml.traces.aggregate.stats import GroupStat
from traceml.traces.query.analysis import Analysis, added
from traceml.traces.query.fields import ArgField
from traceml.traces.query.labels import Labels

__all__ = ["PartialAnalysis", "absorb", "partial_of"]


@dataclass(frozen=True, slots=True)
class Packed:
    """A column of integers in as few bytes as its values need; times in whole microseconds take half or less."""

    values: NDArray[Any]
    least: int
    unit: int
    type: str

    @classmethod
    def of(cls, column: NDArray[Any]) -> Packed:
        """Pack a column that is not empty."""
        least = int(column.min())
        offsets = column.astype(np.int64) - least
        whole = int(column.max()) - least < 2**62 and not (offsets % 1000).any()
        offsets = offsets // 1000 if whole else offsets
        return cls(
            offsets.astype(np.min_scalar_type(int(offsets.max()))), least, 1000 if whole else 1, column.dtype.str
        )

    def column(self) -> NDArray[Any]:
        """Return the column."""
        return (self.values.astype(np.int64) * self.unit + self.least).astype(self.type)


@dataclass(slots=True)
class PartialAnalysis:
    """Analysis of some events of one file."""

    groups: list[tuple[tuple[Any, ...], GroupStat, int]]  # the raw labels of each group, with its statistics and bytes
    lanes: list[
        tuple[Any, ...]
    ]  # the process and thread, or the asynchronous id, by the numbers in `spans` and `edges`
    names: list[Any]  # the names behind the numbers in `edges`
    spans: list[Packed]  # columns for the sorter of an Analysis; empty when there are none
    edges: list[Packed]  # the same for its matcher
    labels: Labels  # labels from metadata
    phase_counts: Counter[str]  # this and the next three: as in Analysis
    events: int
    number_of_spans: int
    fractional: bool
    seen: list[bool]  # whether each field of `args` occurred


def partial_of(analysis: Analysis) -> PartialAnalysis:
    """Return the state of an unfinished analysis."""
    edges = analysis.matcher.edges.columns()
    names = [analysis.context.strings[number] for number in np.unique(edges[3]).tolist()] if edges else []
    if edges:
        edges = (*edges[:3], np.unique(edges[3], return_inverse=True)[1].astype(np.int32), *edges[4:])

    return PartialAnalysis(
        groups=[_group(analysis, number) for number in range(len(analysis.groups[-1]))],
        lanes=[_lane(analysis, number) for number in range(len(analysis.lanes))],
        names=names,
        spans=[Packed.of(column) for column in analysis.sorter.columns()],
        edges=[Packed.of(column) for column in edges],
        labels=analysis.context.labels,
        phase_counts=analysis.phase_counts,
        events=analysis.events,
        number_of_spans=analysis.spans,
        fractional=analysis.fractional,
        seen=[field.seen for field in _arg_fields(analysis)],
    )


def absorb(analysis: Analysis, partial: PartialAnalysis, source: int) -> None:
    """Add a part of the file number `source` to an analysis; parts of a file are added in order."""
    analysis.begin_source(source)
    groups = np.array([_absorb_group(analysis, *group) for group in partial.groups], np.int32)
    lanes = np.array([_absorb_lane(analysis, lane) for lane in partial.lanes], np.int32)
    if partial.spans:
        start, duration, group, lane, kind = (packed.column() for packed in partial.spans)
        analysis.sorter.add(start, duration, groups[group], lanes[lane], kind)

    if partial.edges:
        names = np.array([analysis.context.strings.intern(name) for name in partial.names], np.int32)
        at, is_end, lane, name, group, mark = (packed.column() for packed in partial.edges)
        analysis.matcher.edges.add(at, is_end, lanes[lane], names[name], groups[group], mark)

    analysis.context.labels.merge(partial.labels)
    analysis.phase_counts += partial.phase_counts
    analysis.events += partial.events
    analysis.spans += partial.number_of_spans
    analysis.fractional = analysis.fractional or partial.fractional
    for field, seen in zip(_arg_fields(analysis), partial.seen, strict=True):
        field.seen = field.seen or seen


def _group(analysis: Analysis, number: int) -> tuple[tuple[Any, ...], GroupStat, int]:
    size = int(analysis.bytes[number]) if number < len(analysis.bytes) else 0
    return analysis.raw(number), analysis.stat(number), size


def _absorb_group(analysis: Analysis, raw: tuple[Any, ...], stat: GroupStat, size: int) -> int:
    group = 0
    for field, numbering, value in zip(analysis.fields, analysis.groups, raw, strict=True):
        group = numbering.one(group, field.number(value))

    if stat.count or stat.self_ns or stat.arguments:
        analysis.exact_stat(group).merge(stat)

    analysis.bytes = added(analysis.bytes, np.array([group], np.int32), np.array([size], np.int64))
    return group


def _lane(analysis: Analysis, number: int) -> tuple[Any, ...]:
    strings = analysis.context.strings
    owner, value = analysis.lanes.pair(number)
    if owner >= 0:
        source, pid = analysis.context.process(owner)
        return source, pid, strings[value]

    cat, identity = analysis.asynchronous.pair(value)
    return -2 - owner, strings[cat], strings[identity], "asynchronous"


def _absorb_lane(analysis: Analysis, lane: tuple[Any, ...]) -> int:
    source, first, second, *asynchronous = lane
    intern = analysis.context.strings.intern
    if asynchronous:
        return analysis.lanes.one(-2 - source, analysis.asynchronous.one(intern(first), intern(second)))

    return analysis.lanes.one(analysis.context.processes.one(source, intern(first)), intern(second))


def _arg_fields(analysis: Analysis) -> list[ArgField]:
    fields = [*analysis.fields, *analysis.filter.fields]
    return [field for field in fields if isinstance(field, ArgField)]
