"""`traceml export`: write the rows of a run for other tools."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from traceml.cli.notices import print_left_out
from traceml.cli.options.parsing import Metavar, Positional, parse
from traceml.cli.options.runs_dir_options import RunsDirOptions
from traceml.errors import UsageError
from traceml.formatting import bytes_text, plural, printable
from traceml.runs.export.exporter import FORMATS, ExportResult, default_path, export_run, format_of
from traceml.runs.find import find_run

__all__ = ["main"]

EXIT_INCOMPLETE = 3


@dataclass(frozen=True)
class ExportOptions(RunsDirOptions):
    """Export a run: a trace with ranks, phases, counters and arrows, or all rows as tables.

    perfetto files open at https://ui.perfetto.dev, pfw files in dftracer's tools and `traceml analyze`.

    parquet and csv write a folder with one file per table.

    The run may be running or damaged: everything readable is written. If parts are missing, the exit status is 3.
    """

    run: Annotated[str | None, Positional("[RUN]")] = None
    """The run: its folder, id or name, or the last four characters of its id (default: the latest run)."""
    format: Annotated[str | None, Metavar("FORMAT")] = None
    """perfetto, pfw, parquet or csv (default: by the extension of the output)."""
    output: Annotated[str | None, Metavar("PATH", "-o")] = None
    """File or folder to write (default: named after the run, in the working directory)."""
    json: bool = False
    """Print what was written as JSON and nothing else."""


def main(argv: list[str]) -> int:
    """Export a run."""
    options = parse(ExportOptions, argv, prog="traceml export")
    if options.output == "-":
        raise UsageError("-o -: an export is a file or a folder, not standard output; name it, for example run.pfw.gz")

    export_format = _format(options)
    config = options.config
    run_dir = find_run(options.run, config.runs_dir)
    path = Path(options.output) if options.output else default_path(run_dir, export_format)
    with _progress(f"Writing {path}") as progress:
        exported = export_run(run_dir, export_format, path, progress)

    print(json.dumps(_record(exported), indent=2) if options.json else _summary(exported))
    if not exported.damage:
        return 0

    _print_damage(exported)
    return EXIT_INCOMPLETE


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], object]]:
    """Show a bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda _done, _whole: None
        return

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(escape(printable(what)), total=None)
        yield lambda done, whole: bars.update(task, completed=min(done, whole), total=whole)


def _format(options: ExportOptions) -> str:
    if options.format not in (None, *FORMATS):
        raise UsageError(f"--format: unknown format {options.format}. Formats: {', '.join(FORMATS)}")

    if options.format is not None:
        return options.format

    export_format = format_of(Path(options.output)) if options.output else None
    if export_format is None:
        formats = " or ".join(FORMATS)
        what = f"no format has the extension of {options.output}" if options.output else "no format given"
        raise UsageError(f"{what}: use --format {formats}, or an output with an extension, for example run.pfw.gz")

    return export_format


def _record(exported: ExportResult) -> dict[str, object]:
    return {
        "schema": "traceml.export/1",
        "path": str(exported.path),
        "format": exported.format,
        "files": [str(file) for file in exported.files],
        "bytes": sum(file.stat().st_size for file in exported.files),
        "rows": exported.rows,
        "steps": exported.steps,
        "damage": list(exported.damage),
    }


def _summary(exported: ExportResult) -> str:
    size = bytes_text(sum(file.stat().st_size for file in exported.files))
    if exported.format in ("parquet", "csv"):
        return f"{exported.path}: {plural(len(exported.files), 'table')}, {plural(exported.rows, 'row')}, {size}"

    text = f"{exported.path}: {plural(exported.rows, 'event')}, {plural(exported.steps, 'step')}, {size}"
    return f"{text}. Open it at https://ui.perfetto.dev" if exported.format == "perfetto" else text


def _print_damage(exported: ExportResult) -> None:
    """Report the parts that could not be read."""
    print_left_out("traceml export", exported.damage)
    what = printable(f"{exported.path} is incomplete: the run's store is damaged. Everything readable was written")
    print(f"traceml export: {what}", file=sys.stderr)
