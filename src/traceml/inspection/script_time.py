"""Time since the script of this process began: what it does before it is traced is start-up of its run, too."""

from __future__ import annotations

import os
import sys

from traceml.clock import TICKS_PER_S, process_start_ticks
from traceml.clock import own_time as time
from traceml.inspection.loaded_modules import multiprocessing_parent
from traceml.inspection.user_files import is_user_file

__all__ = ["is_interactive", "note_end_of_run", "note_script", "script_age_ms"]

_pid_of_ended = _pid_of_script = 0


def script_age_ms() -> int:
    """Return the age of this process in milliseconds, if it was started to run the user's script.

    Returns:
        0 in a notebook, an interactive session, a worker of a pool or of another program, and after a first run: when
        the work on the run began is not known there.
    """
    # In a pid namespace without a /proc of its own, this process's number is there that of another process.
    ticks = process_start_ticks("self")
    if ticks is None or _pid_of_ended == os.getpid() or not _runs_script():
        return 0

    return max(int((time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / TICKS_PER_S) * 1000), 0)


def note_script() -> None:
    """Note that this process was started for a script or a function, also while its main module is still ours."""
    global _pid_of_script
    _pid_of_script = os.getpid()


def note_end_of_run() -> None:
    """Note that the next run of this process begins later than the process."""
    global _pid_of_ended
    _pid_of_ended = os.getpid()


def is_interactive() -> bool:
    """Return whether somebody types at this process, in a notebook or an interactive session."""
    return hasattr(sys, "ps1") or "ipykernel" in sys.modules


def _runs_script() -> bool:
    if _pid_of_script == os.getpid():
        return True

    if is_interactive() or multiprocessing_parent() is not None:
        return False

    file = getattr(sys.modules.get("__main__"), "__file__", None)
    return file is not None and is_user_file(file)
