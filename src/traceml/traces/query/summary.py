"""Summaries of traces: read the files, run the query, cache the result."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from traceml.errors import UsageError
from traceml.traces.query.conditions import parse_where
from traceml.traces.query.expressions import parse_by
from traceml.traces.query.labels import read_labels
from traceml.traces.query.measures import Measure
from traceml.traces.query.result_cache import ResultCache
from traceml.traces.reader.trace_files import discover, first_text

if TYPE_CHECKING:
    from traceml.traces.query.analysis import Analysis, TraceQuery
    from traceml.traces.reader.reading import TraceReader

__all__ = ["Progress", "run_query", "summarize"]

Progress = Callable[[int, int], None]  # events so far, files begun so far
_SAMPLED_BYTES = 1 << 20
_SAMPLED_FILES = 4
_SHOWN_KEYS = 30
_ARGS = re.compile(r'"args"\s*:\s*(?=\{)')
Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


def summarize(
    paths: Paths,
    *,
    by: str = "name",
    where: str = "",
    measures: Sequence[Measure] = (),
    report: bool = False,
    dask: Any = None,
    cached: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return the result of a query about traces, in the format `traceml.analysis/1`.

    Args:
        paths: files, folders and patterns.
        by: fields to group by, such as `name,args.size`.
        where: conditions, such as `cat=POSIX,dur>100`.
        measures: what to compute of each group in addition to the usual measures.
        report: whether to add overlap, I/O, kernels, ranks and a timeline.
        dask: the address of a Dask scheduler whose workers read the files, or a `distributed.Client`.
        cached: whether to use the result of an earlier process, and to keep this one.
        progress: called from time to time.

    Raises:
        UsageError: `by` or `where` is not valid.
        TraceNotFoundError: no trace was found under a path.
        TraceEmptyError: there is no event, and a file is no trace.
    """
    fields, conditions = parse_by(by), parse_where(where)
    files = discover(paths)
    asked = ",".join(measure.name for measure in measures)
    cache = ResultCache(files, f"summary {int(report)} {','.join(fields)} [{asked}] {where}")
    known = cache.load() if cached else None
    if known is not None:
        return dict(known)

    from traceml.traces.query.analysis import TraceQuery

    query = TraceQuery(fields, conditions, report, tuple(measures))
    result = _computed(query, files, dask, progress) | {"where": where}
    if cached:
        cache.store(result)

    return result


def run_query(
    query: TraceQuery, files: Sequence[Path], progress: Progress | None = None
) -> tuple[Analysis, TraceReader]:
    """Run a query on files; return the finished analysis."""
    from traceml.traces.query.analysis import Analysis
    from traceml.traces.query.fields import FieldContext
    from traceml.traces.reader.reading import read

    reader = read(files, args=query.args, metadata=query.metadata)
    labels = read_labels(files, query.metadata) if query.needs_labels else None
    context = FieldContext(reader.strings, files, labels)
    analysis = Analysis(query, context)
    events = 0
    for batch in reader:
        analysis.feed(batch)
        events += len(batch)
        if progress is not None:
            progress(events, batch.source + 1)

    for source, facts in enumerate(reader.files):
        context.labels.add_file(source, facts.path, facts.header)

    analysis.finish()
    return analysis, reader


def _computed(query: TraceQuery, files: Sequence[Path], dask: Any, progress: Progress | None) -> dict[str, Any]:
    from traceml.traces.query.aggregated_rows import aggregated_calls
    from traceml.traces.query.result import result_of
    from traceml.traces.reader.event_rows import AGGREGATED

    if dask is None:
        analysis, reader = run_query(query, files, progress)
        facts = reader.files
    else:
        from traceml.traces.query.cluster import run_on

        analysis, facts = run_on(dask, query, files, progress)

    _check_keys(analysis)
    result = result_of(analysis, facts)
    if analysis.phase_counts[AGGREGATED]:
        result["aggregated"] = aggregated_calls(query, files, analysis.context.labels)

    if query.report:
        from traceml.traces.query.overview import report_of

        result["report"] = report_of(analysis)

    return result


def _check_keys(analysis: Analysis) -> None:
    """Refuse keys of `args` that no event has: an empty or single group would look like a result."""
    from traceml.traces.query.fields import ArgField

    fields = [field.key for field in analysis.fields if isinstance(field, ArgField) and not field.seen]
    if absent := [*fields, *analysis.filter.absent]:
        raise UsageError(f"no event has args.{absent[0]}. {_keys_text(analysis)}")

    if unsummed := [key for key in analysis.query.summed if not analysis.has_numbers(key)]:
        chosen = " that matches --where" if analysis.query.conditions else ""
        raise UsageError(f"no span{chosen} has a number args.{unsummed[0]} to sum. {_keys_text(analysis)}")


def _keys_text(analysis: Analysis) -> str:
    keys = ", ".join(f"args.{key}" for key in _sampled_keys(analysis.context.paths))
    return f"There are {keys or 'no args'}"


def _sampled_keys(paths: Sequence[Path]) -> list[str]:
    """Return keys of the `args` of events at the beginning of some traces, sorted."""
    keys: set[str] = set()
    decoder = json.JSONDecoder()
    for path in paths[:_SAMPLED_FILES]:
        text = first_text(path, _SAMPLED_BYTES).decode("utf-8", "replace")
        for match in _ARGS.finditer(text):
            try:
                keys |= decoder.raw_decode(text, match.end())[0].keys()
            except ValueError:
                continue  # damaged, or cut off by the end of the sample

    return sorted(keys)[:_SHOWN_KEYS]
