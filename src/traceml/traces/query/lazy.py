"""Lazy queries from Python: traces are filtered, grouped, and passed to polars, pandas or a loop.

from traceml import traces

reads = traces.open("run/*.pfw.gz").filter("cat=POSIX,name~read")
reads.group_by("name", "rank").agg("count", "sum", "p99").to_polars()
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from traceml.errors import UsageError
from traceml.traces.query.conditions import parse_where
from traceml.traces.query.expressions import check_field
from traceml.traces.query.measures import USUAL, Measure, parse_measures
from traceml.traces.query.summary import summarize
from traceml.traces.reader.trace_files import discover

if TYPE_CHECKING:
    from traceml.traces.reader.columns import TraceFileFacts

__all__ = ["AggregatedTraces", "GroupedTraces", "Traces", "open"]


def open(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> Traces:  # noqa: A001 - traces.open
    """Open traces; they are read when a result is requested.

    Examples:
        >>> traces.open("trace.pfw.gz").filter("cat=POSIX").group_by("name").agg("count", "p95").rows()

    Args:
        paths: files, folders and patterns.

    Raises:
        TraceNotFoundError: no trace was found under a path.
    """
    return Traces(tuple(discover(paths)))


@dataclass(frozen=True, slots=True)
class Traces:
    """Events of traces, optionally filtered.

    Args:
        where: conditions, all of which must hold.
    """

    files: tuple[Path, ...]
    where: str = ""

    def filter(self, where: str) -> Traces:
        """Return the events that also pass conditions like `cat=POSIX,dur>100`.

        Raises:
            UsageError: the conditions are not valid.
        """
        parse_where(where)
        return replace(self, where=f"{self.where},{where}" if self.where and where else self.where or where)

    def group_by(self, *fields: str) -> GroupedTraces:
        """Group spans by fields: name, cat, pid, tid, rank, host, file, source, ph, args.KEY.

        Raises:
            UsageError: there is no such field.
        """
        if not fields:
            raise UsageError("group_by: name at least one field")

        for field in fields:
            check_field(field, "group_by")

        return GroupedTraces(self, fields)

    def summary(self, *, dask: Any = None) -> dict[str, Any]:
        """Return the overview of `traceml analyze` as data: groups by name, overlap, I/O, kernels, ranks, a timeline.

        Args:
            dask: a scheduler's address, or a `distributed.Client`, whose workers read the files.
        """
        return summarize(self.files, where=self.where, report=True, dask=dask)

    def batches(self, *args: str) -> Iterator[dict[str, list[Any]]]:
        """Yield the events in columns, batch by batch: memory does not grow with the files.

        Args:
            args: keys of the events' `args` to add.

        Yields:
            Columns name, cat, ph, pid, tid, args.KEY, ts_ns, dur_ns; begins and ends are events of their own.
        """
        from traceml.traces.query.analysis import TraceQuery
        from traceml.traces.query.event_filter import EventFilter
        from traceml.traces.query.fields import FieldContext
        from traceml.traces.query.frames import EVENT_FIELDS, decoded
        from traceml.traces.query.labels import read_labels
        from traceml.traces.reader.reading import read

        query = TraceQuery(where=parse_where(self.where))
        reading = read(self.files, args=[*args, *query.args], metadata=())
        labels = read_labels(self.files, query.metadata) if query.needs_labels else None
        context = FieldContext(reading.strings, self.files, labels)
        chosen, fields = EventFilter(query.where, context), [*EVENT_FIELDS, *(f"args.{key}" for key in args)]
        for batch in reading:
            mask = chosen.rows(batch) if chosen else None
            columns = decoded(batch, fields, context, mask)
            if columns["ph"]:
                yield columns

    def __iter__(self) -> Iterator[dict[str, list[Any]]]:
        return self.batches()

    def to_polars(self, *args: str) -> Any:
        """Return all events as one polars frame, which has to fit in memory; `args` as in `batches`."""
        from traceml.traces.query.frames import frame_of

        return frame_of(_all(self.batches(*args)), "polars")

    def to_pandas(self, *args: str) -> Any:
        """Return all events as one pandas frame, which has to fit in memory; `args` as in `batches`."""
        from traceml.traces.query.frames import frame_of

        return frame_of(_all(self.batches(*args)), "pandas")

    def facts(self) -> list[TraceFileFacts]:
        """Read the files, and return facts about each, including its damage."""
        from traceml.traces.reader.reading import read

        reading = read(self.files, metadata=())
        for _ in reading:
            pass

        return reading.files


@dataclass(frozen=True, slots=True)
class GroupedTraces:
    """Spans by labels."""

    traces: Traces
    by: tuple[str, ...]

    def agg(self, *measures: str) -> AggregatedTraces:
        """Choose measures of each group.

        Args:
            measures: count, sum, mean, min, max, p50, p99 and self (these by default); std and var (of samples, as in
                polars and pandas), percentiles as in `p95`, sums of arguments as in `sum:args.size`.

        Raises:
            UsageError: there is no such measure.
        """
        return AggregatedTraces(self, parse_measures(measures or USUAL))


@dataclass(frozen=True, slots=True)
class AggregatedTraces:
    """Measures by group, the largest sum first; computed when they are requested."""

    groups: GroupedTraces
    measures: tuple[Measure, ...]

    def rows(self, *, dask: Any = None) -> list[dict[str, Any]]:
        """Return a row per group; times in microseconds.

        Args:
            dask: a scheduler's address, or a `distributed.Client`, whose workers read the files.
        """
        traces = self.groups.traces
        by = ",".join(self.groups.by)
        result = summarize(traces.files, by=by, where=traces.where, measures=self.measures, dask=dask)
        return [{key: group[key] for key in self._names} for group in result["groups"]]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows())

    def to_polars(self) -> Any:
        """Return a polars frame."""
        from traceml.traces.query.frames import frame_of

        return frame_of(self._columns(), "polars")

    def to_pandas(self) -> Any:
        """Return a pandas frame."""
        from traceml.traces.query.frames import frame_of

        return frame_of(self._columns(), "pandas")

    def _columns(self) -> dict[str, list[Any]]:
        rows = self.rows()
        return {key: [row[key] for row in rows] for key in self._names}

    @property
    def _names(self) -> list[str]:
        return [*self.groups.by, *(measure.column for measure in self.measures)]


def _all(batches: Iterator[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    whole: dict[str, list[Any]] = {}
    for batch in batches:
        for name, values in batch.items():
            whole.setdefault(name, []).extend(values)

    return whole
