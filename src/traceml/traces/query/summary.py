"""ResultCache about traces: read, put the question, keep the answer for the next time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from traceml.errors import UsageError
from traceml.traces.query.expressions import parse_by, parse_where
from traceml.traces.query.result_cache import ResultCache
from traceml.traces.reader.trace_files import discover

if TYPE_CHECKING:
    from traceml.traces.query.analysis import Analysis, TraceQuery
    from traceml.traces.query.labels import Labels
    from traceml.traces.reader.reading import TraceReader

__all__ = ["Progress", "learnt", "run", "summarise"]

Progress = Callable[[int, int], None]  # events so far, files begun so far
Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


def summarise(
    paths: Paths,
    *,
    by: str = "name",
    where: str = "",
    report: bool = False,
    dask: Any = None,
    cached: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return the answer to a question about traces, in the shape of `traceml.analysis/1`.

    Args:
        paths: files, folders and patterns.
        by: fields to group by, as `name,args.size`.
        where: conditions, as `cat=POSIX,dur>100`.
        report: whether overlap, I/O, kernels, ranks and a timeline are wanted too.
        dask: the address of a Dask scheduler whose workers read the files, or a `distributed.Client`.
        cached: whether an answer from an earlier process may be used, and this one kept.
        progress: called now and then.

    Raises:
        UsageError: `by` or `where` cannot be understood.
        TraceNotFoundError: a path leads to no trace.
        TraceEmptyError: there is not one event.
    """
    fields, conditions = parse_by(by), parse_where(where)
    files = discover(paths)
    answers = ResultCache(files, f"summary {int(report)} {','.join(fields)} {where}")
    known = answers.load() if cached else None
    if known is not None:
        return dict(known)

    from traceml.traces.query.analysis import TraceQuery

    question = TraceQuery(fields, conditions, report)
    answer = _asked(question, files, dask, progress) | {"where": where}
    if cached:
        answers.store(answer)

    return answer


def run(question: TraceQuery, files: Sequence[Path], progress: Progress | None = None) -> tuple[Analysis, TraceReader]:
    """Put a question to files; the analysis has finished."""
    from traceml.traces.query.analysis import Analysis
    from traceml.traces.query.fields import FieldContext
    from traceml.traces.reader.reading import read

    reading = read(files, args=question.args)
    origin = FieldContext(reading.strings, list(files))
    origin.labels = learnt(question, files)
    analysis = Analysis(question, origin)
    events = 0
    for batch in reading:
        analysis.feed(batch)
        events += len(batch)
        if progress is not None:
            progress(events, batch.source + 1)

    for source, facts in enumerate(reading.files):
        origin.labels.take_file(source, facts.path, facts.header)

    analysis.finish()
    return analysis, reading


def _asked(question: TraceQuery, files: Sequence[Path], dask: Any, progress: Progress | None) -> dict[str, Any]:
    from traceml.traces.query.result import answer_of

    if dask is None:
        analysis, reading = run(question, files, progress)
        facts = reading.files
    else:
        from traceml.traces.query.cluster import run_on

        analysis, facts = run_on(dask, question, files, progress, labels=learnt(question, files))

    _refuse_absent(analysis)
    answer = answer_of(analysis, facts)
    if question.report:
        from traceml.traces.query.overview import report_of

        answer["report"] = report_of(analysis)

    return answer


def learnt(question: TraceQuery, files: Sequence[Path]) -> Labels:
    """Return what metadata says, where conditions rest on it: it may stand anywhere, so it is read first."""
    from traceml.traces.query.labels import Labels
    from traceml.traces.reader.reading import read

    labels = Labels()
    if not any(condition.field in ("rank", "host", "file") for condition in question.where):
        return labels

    reading = read(files)
    for batch in reading:
        labels.take(batch.source, batch.metadata)

    for source, facts in enumerate(reading.files):
        labels.take_file(source, facts.path, facts.header)

    return labels


def _refuse_absent(analysis: Analysis) -> None:
    """Refuse keys of `args` that no event has: an empty or single group would look like an answer."""
    from traceml.traces.query.fields import ArgField
    from traceml.traces.query.sampling import sampled_keys

    fields = [field.key for field in analysis.fields if isinstance(field, ArgField) and not field.seen]
    if absent := [*fields, *analysis.filter.absent]:
        there = sampled_keys(analysis.origin.paths)
        raise UsageError(
            f"no event has args.{absent[0]}. There are {', '.join(f'args.{key}' for key in there) or 'no args'}"
        )
