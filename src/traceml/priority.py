"""Priority of helper processes that run during a training."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["lower_priority"]

_LOWEST = 19


def lower_priority(nice: int = _LOWEST) -> None:
    """Lower the CPU priority of this process; do nothing where the system refuses that.

    Linux groups processes by session (autogroup), and `nice` counts only among the processes of one session. So a
    process that leads a session makes its session nice too.
    """
    try:
        os.nice(nice)
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except OSError:
        pass

    if os.getsid(0) != os.getpid():
        return  # the session has other processes too

    try:
        Path("/proc/self/autogroup").write_text(str(nice))
    except OSError:  # a kernel without groups
        pass
