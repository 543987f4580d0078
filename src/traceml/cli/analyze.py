"""`traceml analyze`: summaries of traces."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from traceml.blas_threads import one_blas_thread
from traceml.cli.notices import spinner
from traceml.cli.options.number_range import NumberRange
from traceml.cli.options.parsing import Metavar, Positional, parse
from traceml.errors import TraceNotFoundError, UsageError
from traceml.helper_programs import importing
from traceml.traces.query.measures import Measure, parse_measures
from traceml.traces.query.summary import summarize

__all__ = ["main"]

_TOP = 20


@dataclass(frozen=True)
class AnalyzeOptions:
    """Summarize traces: dftracer's .pfw, .pfw.gz and .pfw.zst, Chrome and Perfetto JSON, exports of torch.profiler.

    Without --by, an overview: the largest groups, overlap, I/O, kernels, operators, ranks, a timeline.

    Damaged files are read as far as possible, and the damage is reported.
    """

    paths: Annotated[tuple[str, ...], Positional("PATH ...")] = ()
    """Files, folders of them, or patterns."""
    by: Annotated[tuple[str, ...], Metavar("FIELD,...", one_each=True)] = ()
    """Group by these: name, cat, pid, tid, rank, host, file, source, ph, args.KEY (default: name)."""
    where: Annotated[tuple[str, ...], Metavar("CONDITIONS", one_each=True)] = ()
    """Only events that match all of these: 'cat=POSIX,dur>100,name~read'. Operators: = != < <= > >= ~ (pattern) and
    IN (a, b); AND, OR, NOT and parentheses join them. Units are optional (2.5ms, 4KiB); without one, ts and dur are in
    microseconds."""
    agg: Annotated[str | None, Metavar("MEASURE,...")] = None
    """Columns of the groups: count, sum, mean, min, max, self, std, var, percentiles (p95), sums of arguments
    (sum:args.size)."""
    top: Annotated[int | None, NumberRange(), Metavar("N")] = None
    """Number of groups (default: 20, all with --json)."""
    overlap: bool = False
    """With --by: show the overlap of computing, I/O and communication too."""
    timeline: bool = False
    """With --by: show the timeline too."""
    plot: Annotated[str | None, Metavar("FILE")] = None
    """Also draw the groups: FILE.html (a page that opens without a network) or FILE.png."""
    json: bool = False
    """Print the result as JSON and nothing else."""
    dask: Annotated[str | None, Metavar("ADDRESS")] = None
    """Read the files on the workers of this Dask scheduler; they need them under the same paths."""
    no_cache: bool = False
    """Read the files even if the result is cached."""


def main(argv: list[str]) -> int:
    """Print a summary of traces."""
    options = parse(AnalyzeOptions, argv, prog="traceml analyze")
    if not options.paths:
        raise UsageError("name a trace, a folder of traces, or a pattern: traceml analyze PATH")

    _check_plot(options.plot)
    measures = parse_measures(options.agg.split(","), "--agg") if options.agg is not None else ()
    result = _summary(options, measures)
    if options.plot is not None:
        _plot(result, Path(options.plot), options.top or _TOP)

    if options.json:
        print(json.dumps({**result, "groups": result["groups"][: options.top]}, indent=2, allow_nan=False))
    else:
        _show(result, options, measures)

    return 0


def _check_plot(path: str | None) -> None:
    """Check before the traces are read that the chart can be drawn.

    Raises:
        UsageError: it cannot be; the text says why.
    """
    if path is None:
        return

    if Path(path).suffix not in (".html", ".png"):
        raise UsageError(f"--plot: {path} ends neither in .html nor in .png")

    if not Path(path).absolute().parent.is_dir():
        raise UsageError(f"--plot: there is no folder {Path(path).parent}")

    if find_spec("matplotlib") is None:
        from traceml.installation import install_command

        raise UsageError(f"--plot needs Matplotlib: {install_command('plot')}")


def _plot(result: dict[str, Any], path: Path, top: int) -> None:
    from traceml.renderers.charts.trace_chart import trace_page, trace_picture

    is_page = path.suffix == ".html"
    path.write_bytes(trace_page(result, top).encode() if is_page else trace_picture(result, top))
    print(f"The chart is in {path}", file=sys.stderr)


def _summary(options: AnalyzeOptions, measures: tuple[Measure, ...]) -> dict[str, Any]:
    report = not options.by or options.overlap or options.timeline
    with one_blas_thread(), importing(), spinner("Reading") as show:
        try:
            return summarize(
                options.paths,
                by=",".join(options.by or ["name"]),
                where=_all_of(options.where),
                measures=measures,
                report=report,
                dask=options.dask,
                cached=not options.no_cache,
                progress=lambda events, files: show(f"Reading: {events:,} events, file {files}"),
            )
        except TraceNotFoundError as error:
            raise _with_hint(error, options.paths) from error


def _all_of(conditions: tuple[str, ...]) -> str:
    """Return the conditions of several --where as one."""
    return conditions[0] if len(conditions) == 1 else ",".join(f"({each})" for each in conditions)


def _with_hint(error: TraceNotFoundError, paths: tuple[str, ...]) -> TraceNotFoundError:
    """Return the error for a run's folder, which contains a store and no trace, with the commands to use."""
    from traceml.run_folder import STORE_NAME

    run = next((path for path in paths if Path(path, STORE_NAME).exists()), None)
    if run is None:
        return error

    commands = f"traceml export {shlex.quote(run)} --format pfw -o run.pfw.gz && traceml analyze run.pfw.gz --by rank"
    return TraceNotFoundError(f"{run} is the folder of a run and contains no trace. Create one: {commands}")


def _show(result: dict[str, Any], options: AnalyzeOptions, measures: tuple[Measure, ...]) -> None:
    from traceml.renderers.text.trace_analysis import SECTIONS, analysis_lines
    from traceml.renderers.text.viewport import Viewport, plain_console

    chosen = {"groups": True, "aggregated": True, "overlap": options.overlap, "timeline": options.timeline}
    sections = SECTIONS if not options.by else [name for name, wanted in chosen.items() if wanted]
    console = plain_console()
    columns = [(measure.name, measure.column) for measure in measures]
    viewport, top = Viewport.of(console), options.top or _TOP
    for line in analysis_lines(result, viewport, top=top, sections=sections, columns=columns):
        console.print(line, soft_wrap=True)
