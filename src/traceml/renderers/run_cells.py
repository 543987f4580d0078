"""Cells of lists of runs: a field, parameter or metric of a run as text, for terminal and page."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

from traceml.database.states import RunStatus
from traceml.formatting import bytes_text, duration_text, ms_text, printable, rate_text, value_text
from traceml.runs.find import RunInfo
from traceml.runs.run_query import RunFields

__all__ = ["TEXT_FIELDS", "run_cell"]

TEXT_FIELDS = (
    "id",
    "name",
    "project",
    "user",
    "state",
    "verdict",
    "severity",
    "tags",
    "note",
    "started",
    "git.commit",
    "git.branch",
    "git.dirty",
)
"""Fields that are texts: aligned left, numbers right."""

_COMMIT = 10  # characters: enough to find it


def run_cell(run: RunFields, name: str) -> str:
    """Return a field, parameter or metric of a run as text, `-` where it has none."""
    value = _took(run.info) if name == "took" else run.value(name)
    if value is None or value == "":
        return "-"

    if name in _SHOWN:
        return _SHOWN[name](value)

    return printable(value_text(value))


def _took(info: RunInfo) -> float | None:
    if info.duration_s is None and info.started is not None and info.state == RunStatus.RUNNING:
        return time.time() - info.started

    return info.duration_s


def _started(started_s: Any) -> str:
    return datetime.fromtimestamp(started_s).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


_SHOWN: dict[str, Callable[[Any], str]] = {
    "samples/s": rate_text,
    "step_ms": ms_text,
    "took": duration_text,
    "size": bytes_text,
    "started": _started,
    "git.commit": lambda commit: str(commit)[:_COMMIT],
}
