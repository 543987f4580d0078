"""Trainings that a job stored as runs of their own, other than the run whose card is printed."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from traceml.errors import StoreError
from traceml.run_folder import REPORT_NAME, STORE_NAME
from traceml.runs.find import run_folders
from traceml.runs.report.report_types import read_report

__all__ = ["other_trainings"]

_SHOWN = 3


def other_trainings(run_dir: Path) -> str:
    """Return a sentence that names them; empty without any.

    Processes that a script starts, and that share no process group, are such trainings: Hogwild, a search with a
    process for each model.
    """
    started = read_report(run_dir / REPORT_NAME).run.started or 0.0
    later = [path for path in run_folders(run_dir.parent) if path != run_dir and _written(path) >= started]
    job = _job(run_dir) if later else ""
    names = sorted(path.name for path in later if job and _job(path).startswith(f"{job}#"))
    if not names:
        return ""

    count = len(names)
    are = f"{count} more processes have runs of their own"
    are = are if count > 1 else "one more process has a run of its own"
    more = f" and {count - _SHOWN} more" if count > _SHOWN else ""
    return f"{are}: {', '.join(names[:_SHOWN])}{more} (`traceml report RUN`)"


def _written(path: Path) -> float:
    with suppress(OSError):  # only its report was kept
        return (path / STORE_NAME).stat().st_mtime

    return 0.0


def _job(path: Path) -> str:
    """Return the key of a run's job; with the run behind it, where the job had another one at that time."""
    from traceml.database.store.reader import StoreReader  # imports numpy, which most runs do not need here

    with suppress(StoreError, OSError), StoreReader(path / STORE_NAME) as reader:
        return str(reader.meta().get("run", {}).get("job", ""))

    return ""
