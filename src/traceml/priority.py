"""Giving way to the training: the priority of processes that work for it beside it."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["step_back"]

_LOWEST = 19


def step_back(nice: int = _LOWEST) -> None:
    """Take the processor only where nobody else wants it; where the system refuses that, go on as before.

    A process that leads a session of its own is weighed as a session: Linux groups processes by session (autogroup),
    and `nice` counts among those of one session alone. So the session is made nice, too.

    Args:
        nice: how far to step back, up to 19.
    """
    try:
        os.nice(nice)
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except OSError:
        pass

    if os.getsid(0) != os.getpid():
        return  # the session is somebody else's, too

    try:
        Path("/proc/self/autogroup").write_text(str(nice))
    except OSError:  # a kernel without groups
        pass
