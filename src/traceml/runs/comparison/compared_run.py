"""One run of a comparison: its report, and the times of its steps in order."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traceml.database.store.reader import StoreReader
from traceml.errors import StoreError
from traceml.run_folder import REPORT_NAME, STORE_NAME
from traceml.runs.report.comparison_facts import job_times
from traceml.runs.report.report import full_report
from traceml.runs.report.report_types import Report, read_report
from traceml.runs.report.store_problem import store_problem
from traceml.runs.rows.run_summary_reader import read_run_summary

__all__ = ["ComparedRun", "read_compared"]


@dataclass(frozen=True, slots=True)
class ComparedRun:
    """One run of a comparison."""

    report: Report
    times_ms: NDArray[Any]  # step times in order, the mean over ranks; of a report without its run, those that it holds
    is_file: bool = False  # whether only its report is there
    store_problem: str = ""  # of a folder whose store is missing or damaged: `is damaged`


def read_compared(path: Path) -> ComparedRun:
    """Return a run for a comparison.

    Args:
        path: its folder, or its `report.json` without a folder. Of a folder whose store is missing or damaged, the
            report is read.

    Raises:
        StoreError: neither the store nor the report can be read.
    """
    if not path.is_dir():
        return _from_report(path)
    if not (path / STORE_NAME).exists() and (path / REPORT_NAME).is_file():
        return _from_report(path / REPORT_NAME, store_problem(path))

    try:
        return _from_store(path)
    except StoreError:
        with suppress(OSError, StoreError):
            return _from_report(path / REPORT_NAME, store_problem(path) or "cannot be read")

        raise


def _from_report(path: Path, problem: str = "") -> ComparedRun:
    report = read_report(path)
    return ComparedRun(report, np.array(report.step_times.ms), is_file=True, store_problem=problem)


def _from_store(run_dir: Path) -> ComparedRun:
    with StoreReader(run_dir / STORE_NAME) as reader:
        summary = read_run_summary(reader)
        report = full_report(summary, reader, run_dir)
        return ComparedRun(report, job_times(summary.all_aligned()))
