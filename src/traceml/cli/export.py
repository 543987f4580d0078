"""`traceml export`: the rows of a run, for other tools."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.text import Text

from traceml.cli.parsing import parse
from traceml.errors import UsageError
from traceml.formatting import bytes_text, count_text
from traceml.runs.export.exporter import FORMATS, ExportResult, default_path, export_run, format_of
from traceml.runs.find import find_run
from traceml.settings import load

__all__ = ["main"]

_SHOWN = 5


@dataclass(frozen=True)
class Options:
    """Write a run for other tools: a trace with ranks, phases, counters and arrows, or all rows as tables.

    perfetto opens at https://ui.perfetto.dev, pfw in dftracer's tools and in `traceml analyze`.

    parquet and csv are a folder with a file per table.

    Works on a run that goes on, and on a damaged one: what can be read is written.
    """

    run: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[RUN]", help_behavior_hint="")] = None
    """A run's folder, its id (or the last four letters of it); the latest run when left out."""
    format: Annotated[str | None, tyro.conf.arg(metavar="FORMAT", help_behavior_hint="")] = None
    """perfetto, pfw, parquet or csv; not needed where the output's name tells."""
    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"], metavar="PATH", help_behavior_hint="")] = None
    """File or folder to write (default: by the run's id, in the working directory)."""
    runs_dir: Annotated[str | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None
    """Where the runs are (default: the setting runs_dir)."""


def main(argv: list[str]) -> int:
    """Export a run."""
    options = parse(Options, argv, prog="traceml export")
    form = _format(options)
    config = load() if options.runs_dir is None else load(runs_dir=options.runs_dir)
    run_dir = find_run(options.run, config.runs_dir)
    path = Path(options.output) if options.output else default_path(run_dir, form)
    with _progress(f"Writing {path}"):
        exported = export_run(run_dir, form, path)

    print(_told(exported))
    _complain(exported)
    return 0


def _progress(what: str) -> AbstractContextManager[object]:
    """Say what takes its time, on a terminal only."""
    return Console(stderr=True).status(Text(what)) if sys.stderr.isatty() else nullcontext()


def _format(options: Options) -> str:
    if options.format not in (None, *FORMATS):
        raise UsageError(f"--format: no such format: {options.format}. Formats: {', '.join(FORMATS)}")

    if options.format is not None:
        return options.format

    form = format_of(Path(options.output)) if options.output else None
    if form is None:
        raise UsageError(f"which format? --format {' or '.join(FORMATS)}, or an output whose name tells, as run.pfw.gz")

    return form


def _told(exported: ExportResult) -> str:
    size = bytes_text(sum(file.stat().st_size for file in exported.files))
    if exported.format in ("parquet", "csv"):
        return f"{exported.path}: {len(exported.files)} tables, {count_text(exported.rows)} rows, {size}"

    text = f"{exported.path}: {count_text(exported.rows)} events, {count_text(exported.steps)} steps, {size}"
    return f"{text}. Open it at https://ui.perfetto.dev" if exported.format == "perfetto" else text


def _complain(exported: ExportResult) -> None:
    """Say what is missing."""
    for what in exported.damage[:_SHOWN]:
        print(f"traceml export: left out: {what}", file=sys.stderr)

    if len(exported.damage) > _SHOWN:
        print(f"traceml export: and {len(exported.damage) - _SHOWN} more", file=sys.stderr)
