"""The reports on disk, `report.json` and `report.html`, made from one reading of the store."""

from __future__ import annotations

import logging
from pathlib import Path

from traceml.database.states import RunStatus
from traceml.database.store.reader import StoreReader
from traceml.fail_open import fail_open
from traceml.formatting import ESCAPED
from traceml.renderers.html.report_page import report_page
from traceml.run_folder import PAGE_NAME, STORE_NAME
from traceml.runs.about import about_run
from traceml.runs.report.report import full_report, save_report, update_trackers, write_atomic
from traceml.runs.report.report_types import Report
from traceml.runs.rows.run_summary_reader import RunSummaryReader, read_run_summary
from traceml.runs.rows.series import summary_series
from traceml.settings import load

__all__ = ["page_text", "refresh_reports", "write_page", "write_reports"]

_log = logging.getLogger("traceml")


def write_reports(run_dir: Path) -> Path:
    """Write both reports into the run's folder and return the path of `report.json`.

    With the setting `fleet_dir`, a run that has ended is added to the fleet's dataset; a failure is only logged.

    Raises:
        StoreError: the store cannot be read.
        OSError: `report.json` cannot be written; a failure to make the page is only logged.
    """
    run_dir = Path(run_dir)
    with StoreReader(run_dir / STORE_NAME) as reader:
        summary = read_run_summary(reader)
        report = full_report(summary, reader, run_dir)
        path = save_report(run_dir, report)
        with fail_open(_log, "display", f"{run_dir / PAGE_NAME} was not written"):
            write_atomic(run_dir / PAGE_NAME, _page(summary, reader, report))

    with fail_open(_log, "display", f"{run_dir.name} was not added to the fleet's dataset"):
        _add_to_fleet(run_dir, report)

    return path


def _add_to_fleet(run_dir: Path, report: Report) -> None:
    folder = load().fleet_dir
    if folder is not None and report.run.state != RunStatus.RUNNING:
        from traceml.runs.fleet.fleet_dataset import FleetDataset, is_relayed

        if not is_relayed(run_dir):
            FleetDataset(folder).add(report)


def refresh_reports(run_dir: Path) -> None:
    """Update the section on trackers in the written reports, if there are any.

    Raises:
        StoreError: the store cannot be read.
        OSError: the folder cannot be written.
    """
    if update_trackers(run_dir) and (Path(run_dir) / PAGE_NAME).exists():
        write_atomic(Path(run_dir) / PAGE_NAME, page_text(run_dir))


def write_page(run_dir: Path, path: Path) -> None:
    """Write the HTML report of a run, running or ended, to a file that the user chose, atomically; also through a link.

    Raises:
        StoreError: the store cannot be read.
        OSError: the file cannot be written.
    """
    path, page = Path(path), page_text(run_dir)
    if path.exists() and not path.is_file():  # a pipe or a device is written to, not replaced
        path.write_text(page, encoding="utf-8", errors=ESCAPED)
        return

    write_atomic(path.resolve(), page)  # a link stays a link


def page_text(run_dir: Path) -> str:
    """Return the HTML report of a run, running or ended.

    Raises:
        StoreError: the store cannot be read.
    """
    with StoreReader(Path(run_dir) / STORE_NAME) as reader:
        summary = read_run_summary(reader)
        return _page(summary, reader, full_report(summary, reader, Path(run_dir)))


def _page(summary: RunSummaryReader, reader: StoreReader, report: Report) -> str:
    return report_page(report, summary_series(summary, reader), about_run(reader))
