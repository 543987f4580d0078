"""State of a run: as stored, or lost if the aggregator that would update it is gone."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from typing import Any

from traceml.clock import boot_id, pid_namespace, process_start_ticks
from traceml.database.states import RunStatus

__all__ = ["UNREADABLE_STATES", "is_watched", "is_written_by", "state_of"]

UNREADABLE_STATES = ("damaged", "newer", "older")
"""States in lists of runs whose store this traceml cannot read: it is damaged, or of another version."""


# A writer stores samples of its ranks every second, and in very large jobs once a minute.
_SILENT_S = 86400.0


def state_of(run: Mapping[str, Any], aggregator: Mapping[str, Any], written_s: float | None) -> str:
    """Return running, finished, stopped (by Ctrl-C, or by its launcher), failed, hung or lost.

    Args:
        run: the store's facts of the run.
        aggregator: the store's facts of the aggregator that wrote it last.
        written_s: epoch seconds at which the store was last written; None if that is not known.
    """
    state = str(run.get("state", RunStatus.RUNNING.value))
    return RunStatus.LOST.value if state == RunStatus.RUNNING and not is_watched(aggregator, written_s) else state


def is_watched(aggregator: Mapping[str, Any], written_s: float | None, silent_s: float = _SILENT_S) -> bool:
    """Return whether the aggregator that writes the store is alive, as far as this host can know.

    Args:
        aggregator: as of `state_of`.
        written_s: likewise.
        silent_s: an aggregator elsewhere that has written nothing for so many seconds is gone.
    """
    is_here = aggregator.get("host") == socket.gethostname()
    if is_here and aggregator.get("boot_id") != boot_id():
        return False

    # In a container, or seen from one, its number means nothing here.
    if not is_here or aggregator.get("pid_namespace", pid_namespace()) != pid_namespace():
        return written_s is None or time.time() - written_s < silent_s

    pid = aggregator.get("pid")
    return isinstance(pid, int) and process_start_ticks(pid) == aggregator.get("start_ticks")


def is_written_by(aggregator: Mapping[str, Any], pid: int) -> bool:
    """Return whether the aggregator that writes the store is a process of this host; in containers, many are called 7.

    Args:
        aggregator: as of `state_of`.
        pid: process id of a running aggregator.
    """
    here = {"host": socket.gethostname(), "boot_id": boot_id(), "pid_namespace": pid_namespace(), "pid": pid}
    return all(aggregator.get(name) == value for name, value in here.items())
