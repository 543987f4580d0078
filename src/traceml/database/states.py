"""States of a run, as the store and the report have them."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["ENDED_BADLY", "RunStatus"]


class RunStatus(StrEnum):
    """State of a run. Fields that hold one are plain text: another version may know more."""

    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"  # by Ctrl-C, or by its launcher
    FAILED = "failed"
    HUNG = "hung"  # it ended, or was ended, after its ranks had waited for each other
    LOST = "lost"  # its processes were gone without a word


ENDED_BADLY = frozenset({RunStatus.FAILED, RunStatus.HUNG, RunStatus.LOST})
"""States of runs whose training did not do what it was started for."""
