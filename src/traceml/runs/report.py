"""The report: what a run was, what limits it, and on which numbers that rests, as JSON (`traceml.report/1`)."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from traceml.database.reader import StoreReader
from traceml.database.schema import STEPS
from traceml.database.store_file import STORE_NAME
from traceml.diagnosis.findings import Finding, plain
from traceml.diagnosis.window import Window, slots_for
from traceml.runs import sections
from traceml.runs.digest import MAX_STEP_ROWS, Digest
from traceml.runs.metric_summary import trackers
from traceml.runs.run_state import state_of

__all__ = [
    "PAGE_NAME",
    "REPORT_NAME",
    "SCHEMA",
    "build_report",
    "described",
    "digest_of",
    "report_of",
    "save_report",
    "update_trackers",
    "whole_report",
    "write_report",
    "write_whole",
]

SCHEMA = "traceml.report/1"
REPORT_NAME = "report.json"
PAGE_NAME = "report.html"


def build_report(run_dir: Path, max_step_rows: int = MAX_STEP_ROWS) -> dict[str, Any]:
    """Return the report of a run, also of one that is still going on.

    Args:
        run_dir: its folder.
        max_step_rows: look at the last so many step rows of all ranks together; a longer run says `cut`.

    Raises:
        StoreError: the store is missing, damaged, or of another version.
    """
    run_dir = Path(run_dir)
    with closing(StoreReader(run_dir / STORE_NAME)) as reader:
        return whole_report(digest_of(reader, max_step_rows), reader, run_dir)


def digest_of(reader: StoreReader, max_step_rows: int = MAX_STEP_ROWS) -> Digest:
    """Return the digest of a whole run, or of its last `max_step_rows` step rows.

    Raises:
        StoreError: the store is damaged.
    """
    digest = Digest(_slots(reader, max_step_rows))
    digest.start_at(reader, max_step_rows)
    digest.update(reader)
    return digest


def whole_report(digest: Digest, reader: StoreReader, run_dir: Path) -> dict[str, Any]:
    """Return the report on everything that a digest holds.

    Args:
        digest: of the whole run.
        reader: its store.
        run_dir: its folder.
    """
    findings = digest.diagnose(last=digest.window.slots)
    return report_of(digest, reader, described(digest, digest.window.slots), findings, run_dir)


def described(digest: Digest, last: int = 200) -> Window:
    """Return the steps that a report describes: those of the diagnosis, or the first ones where there are no others."""
    window = digest.window.aligned(last=last)
    return window if len(window) else digest.window.aligned(last=last, skip_first=0)


def write_report(run_dir: Path) -> Path:
    """Write `report.json` into the run's folder and return its path; the file appears whole or not at all.

    Raises:
        StoreError: the store cannot be read.
        OSError: the folder cannot be written.
    """
    return save_report(run_dir, build_report(run_dir))


def save_report(run_dir: Path, report: dict[str, Any]) -> Path:
    """Write a report into the run's folder and return its path; the file appears whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    path = Path(run_dir) / REPORT_NAME
    _replace(path, report)
    return path


def update_trackers(run_dir: Path) -> bool:
    """Bring the section on trackers of a written report up to date; return whether it had to be.

    Raises:
        StoreError: the store cannot be read.
        OSError: the folder cannot be written.
    """
    path = Path(run_dir) / REPORT_NAME
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False

    with closing(StoreReader(Path(run_dir) / STORE_NAME)) as reader:
        now = trackers(Path(run_dir), reader)

    if report.get("trackers") == now:
        return False

    report["trackers"] = now
    _replace(path, report)
    return True


def _replace(path: Path, report: dict[str, Any]) -> None:
    write_whole(path, json.dumps(report, indent=2, allow_nan=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    draft = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8", errors="replace")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def report_of(
    digest: Digest,
    reader: StoreReader,
    window: Window,
    findings: Sequence[Finding],
    run_dir: Path,
    telemetry: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the report on a digest.

    Args:
        digest: the run, as far as it was read.
        reader: its store.
        window: the steps to describe.
        findings: the diagnosis, the verdict first.
        run_dir: its folder.
        telemetry: that section, where it was made a moment ago.
    """
    from traceml.version import __version__

    steps = sections.steps(digest, window)
    told = [finding.to_dict() for finding in findings]
    return {
        "schema": SCHEMA,
        "traceml_version": __version__,
        "run": _run(digest, run_dir),  # not rounded: it holds epoch seconds
        "verdict": told[0],
        "findings": told,
        "steps": plain({**steps, "cut": digest.cut}),
        "phases": plain(sections.phases(digest, window)),
        "ranks": plain(sections.ranks(digest)),
        "memory": plain(sections.memory(digest)),
        "system": plain(sections.system(digest)),
        "metrics": digest.metrics.section(),
        "hidden_metrics": digest.metrics.hidden,  # names beyond those that a report has room for
        "trackers": trackers(run_dir, reader),
        "telemetry": telemetry or plain(sections.telemetry(digest, reader, steps["mean_ms"])),
    }


def _run(digest: Digest, run_dir: Path) -> dict[str, Any]:
    run = digest.run
    state = state_of(run, digest.aggregator)
    started, ended = run.get("started"), run.get("ended")
    if ended is None and state != "running":
        ended = _last_written_s(run_dir)  # nobody was there to note it

    until = ended if ended is not None else time.time()
    return {
        "id": str(run.get("id", run_dir.name)),
        "name": str(run.get("name", run_dir.name)),
        "project": str(run.get("project", "default")),
        "attempt": max((stream.attempt for stream in digest.streams.values()), default=int(run.get("attempt", 0))),
        "started": started,
        "ended": ended,
        "duration_s": until - started if started is not None else None,
        "state": state,
        "world_size": int(run.get("world_size", max(len(digest.ranks), 1))),
        "hosts": sorted({stream.host for stream in digest.ranks.values()}) or list(run.get("hosts", [])),
        "command": run.get("command", ""),
    }


def _last_written_s(run_dir: Path) -> float | None:
    """Return when the store was written last, in epoch seconds."""
    files = [run_dir / STORE_NAME, run_dir / f"{STORE_NAME}-wal"]
    return max((path.stat().st_mtime for path in files if path.exists()), default=None)


def _slots(reader: StoreReader, max_step_rows: int) -> int:
    """Return how many steps per rank hold the whole run, within the bound."""
    ranks = max(len({stream.rank for stream in reader.streams()}), 1)
    wanted = min(reader.stored(STEPS.name), max_step_rows) // ranks + 1
    slots = 128
    # Uneven ranks are given room too: the longest may have most of the rows.
    while slots < 2 * wanted and slots * ranks < 2 * max_step_rows:
        slots *= 2

    return max(slots, slots_for(ranks))
