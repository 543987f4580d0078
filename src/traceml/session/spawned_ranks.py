"""Ranks that a script starts by `torch.multiprocessing.spawn`: which of their processes failed first.

It ends the others by a signal when one has failed, and raises an exception that names that one. To the aggregator all
of them look alike: gone without a word.
"""

from __future__ import annotations

import os
import sys

from traceml.clock import own_time as time

__all__ = ["SpawnedRanks"]

_VARIABLE = "TRACEML_FAILURES_FD"
_MODULE = "torch.multiprocessing.spawn"


class SpawnedRanks:
    """Reports the process that failed first to `traceml run`, which has given this process a descriptor for that."""

    def __init__(self) -> None:
        fd = os.environ.pop(_VARIABLE, "")
        self._fd = int(fd) if fd else None
        if self._fd is not None:
            os.set_inheritable(self._fd, False)

    def report(self, error: BaseException) -> None:
        """Report the process that an exception of the script names, if it names one."""
        # What the process raised itself, it has reported: that exception has no exit code.
        kind = getattr(sys.modules.get(_MODULE), "ProcessExitedException", None)
        if self._fd is None or kind is None or not isinstance(error, kind):
            return

        from traceml.transport.exit_report import ExitReport, write_report

        ended = ExitReport(pid=error.error_pid, exitcode=error.exit_code, time=time.time())
        write_report(self._fd, ended)
