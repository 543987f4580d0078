"""`traceml report`: the verdict of a run, running or ended."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from traceml.cli import EXIT_GATE
from traceml.cli.options.parsing import Metavar, Positional, parse
from traceml.cli.options.runs_dir_options import RunsDirOptions
from traceml.database.flight.flight_owner import waiting_steps
from traceml.database.states import RunStatus
from traceml.diagnosis.kinds import Kind
from traceml.errors import RunNotFoundError, StoreError, UsageError
from traceml.fail_open import writing
from traceml.renderers.text.card import print_report
from traceml.renderers.text.profile_tables import print_lines
from traceml.renderers.text.report_markdown import report_markdown
from traceml.renderers.text.viewport import plain_console
from traceml.renderers.views import run_view
from traceml.run_folder import REPORT_NAME, STORE_NAME
from traceml.runs.export.flame_graph import FLAME_GRAPHS
from traceml.runs.find import find_run
from traceml.runs.report.line_shares import LinesDocument
from traceml.runs.report.report_types import Report, TrackerSection, read_report
from traceml.runs.report.store_problem import store_problem
from traceml.track.tracker_state import states_of

__all__ = ["current_report", "main"]


@dataclass(frozen=True)
class ReportOptions(RunsDirOptions):
    """Show what limits a run: the verdict, the numbers behind it, and what to do next.

    The run may be running or ended.
    """

    run: Annotated[str | None, Positional("[RUN]")] = None
    """The run: its folder, id or name, or the last four characters of its id (default: the latest run)."""
    json: bool = False
    """Print the report, or with --lines the lines, as JSON and nothing else."""
    md: bool = False
    """Print the report as Markdown, for a pull request."""
    html: Annotated[str | None, Metavar("FILE")] = None
    """Write the report with its charts as one HTML file, and print nothing."""
    lines: bool = False
    """Show in which lines of the code the time was spent, by phase, from samples of the training threads.
    With --md they are a table after the report; the page of --html always has them."""
    format: Annotated[Literal["speedscope", "perfetto"] | None, Metavar("FORMAT")] = None
    """With --lines: print them as a flame graph for speedscope.app (speedscope) or ui.perfetto.dev (perfetto)."""
    fail_on: Annotated[tuple[str, ...], Metavar("KIND")] = ()
    """Exit with 1 if there is a finding of one of these kinds, for example RANK_LOST INPUT_BOUND."""


def main(argv: list[str]) -> int:
    """Print a report; return 0, or 1 if there is an unwanted finding."""
    options = parse(ReportOptions, argv, prog="traceml report")
    unwanted = _kinds(options.fail_on)
    if not unwanted and any(word.partition("=")[0] == "--fail-on" for word in argv):
        raise UsageError("--fail-on needs a KIND, for example --fail-on RANK_LOST INPUT_BOUND")

    documents = sum((options.json, options.md, options.html is not None))
    if documents > 1:
        raise UsageError("--json, --md and --html cannot be combined")

    if options.format and (documents or not options.lines):
        raise UsageError("--format needs --lines, alone: `traceml report --lines --format speedscope > lines.json`")

    run_dir = _find_run(options)
    report = current_report(run_dir)
    is_written = report.run.state != RunStatus.RUNNING and options.html is None and (run_dir / REPORT_NAME).exists()
    if is_written and (problem := store_problem(run_dir)):
        print(f"traceml report: {run_dir.name}: {STORE_NAME} {problem}; {REPORT_NAME} is shown", file=sys.stderr)

    if options.html is not None:
        _write_page(run_dir, Path(options.html))
    elif options.json:
        print((LinesDocument.of(report) if options.lines else report).to_json())
    elif options.md:
        print(report_markdown(report, lines=options.lines), end="")
    elif options.format:
        print(json.dumps(FLAME_GRAPHS[options.format](report)))
    elif options.lines:
        print_lines(run_view(report), console=plain_console())
    else:
        print_report(report, run_dir, console=plain_console())

    return _gate(report, unwanted)


def _find_run(options: ReportOptions) -> Path:
    try:
        return find_run(options.run, options.config.runs_dir)
    except RunNotFoundError as error:
        from traceml.cli.jobs.running_job import name_joined_run  # loads the rules, too

        raise name_joined_run(error, options.run) from error


def _write_page(run_dir: Path, path: Path) -> None:
    from traceml.display.report_files import write_page

    with writing(path, "Name a file that can be written."):
        try:
            write_page(run_dir, path)
        except StoreError as error:
            raise StoreError(f"cannot draw {run_dir}: {error}") from error


def current_report(run_dir: Path) -> Report:
    """Return the report of a run: the one written at its end, or one made from its store now.

    Raises:
        StoreError: neither can be read.
    """
    try:
        report = read_report(run_dir / REPORT_NAME)
        if report.run.state != RunStatus.RUNNING:
            report.trackers = _trackers_now(run_dir) or report.trackers  # deliveries may continue after the end
            if report.run.state == RunStatus.LOST:  # and so may its ranks
                report.run.steps_waiting = waiting_steps(run_dir)

            return report
    except (OSError, StoreError):
        pass  # not written yet, or damaged: the store has everything

    from traceml.runs.report.report import build_report  # its modules take longer to import than all others

    try:
        return build_report(run_dir)
    except StoreError as error:
        raise StoreError(f"cannot report on {run_dir}: {error}") from error


def _trackers_now(run_dir: Path) -> list[TrackerSection]:
    if not states_of(run_dir):
        return []

    from traceml.database.store.reader import StoreReader  # imports numpy
    from traceml.runs.report.trackers import trackers

    try:
        with StoreReader(run_dir / STORE_NAME) as reader:
            return trackers(run_dir, reader)
    except StoreError:
        return trackers(run_dir)


def _kinds(words: tuple[str, ...]) -> frozenset[str]:
    kinds = {part: part.upper().replace("-", "_") for word in words for part in word.split(",") if part}
    if unknown := sorted(part for part, kind in kinds.items() if kind not in set(Kind)):
        raise UsageError(
            f"--fail-on: no such kind: {', '.join(unknown)}. Kinds: {', '.join(Kind)}. RUN comes before --fail-on"
        )

    return frozenset(kinds.values())


def _gate(report: Report, unwanted: frozenset[str]) -> int:
    found = [finding.kind.value for finding in report.findings if finding.kind in unwanted]
    if not found:
        return 0

    print(f"traceml report: found {', '.join(dict.fromkeys(found))} (--fail-on)", file=sys.stderr)
    return EXIT_GATE
