"""The rank's own process: memory, CPU time, threads, switches, page faults, and how long its main thread waited."""

from __future__ import annotations

import os
import resource
import time
from typing import ClassVar

from traceml.database.schema import PROCESS, Table
from traceml.samplers.base import Row
from traceml.samplers.procfs import KeptFile

__all__ = ["ProcessSampler"]

_UNKNOWN = -1


class ProcessSampler:
    """Samples this process.

    Raises:
        OSError: there is no /proc.
    """

    name: ClassVar[str] = "process"
    table: ClassVar[Table] = PROCESS
    start_interval_s: ClassVar[float | None] = 0.1
    cost_us: ClassVar[float] = 7.4

    def __init__(self) -> None:
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")
        self._statm = KeptFile("/proc/self/statm", 256)
        # The main thread has the process's id; the kernel may be built without these figures.
        try:
            self._sched: KeptFile | None = KeptFile(f"/proc/self/task/{os.getpid()}/schedstat", 256)
        except OSError:
            self._sched = None

    def sample(self, t_ns: int, step: int) -> tuple[Row]:
        """Return the one row of this moment."""
        resident_pages = int(self._statm.read().split(None, 2)[1])
        usage = resource.getrusage(resource.RUSAGE_SELF)
        run_ns, wait_ns = self._main_thread()
        row = (
            t_ns,
            step,
            resident_pages * self._page_bytes,
            time.process_time_ns(),
            os.stat("/proc/self/task").st_nlink - 2,  # noqa: PTH116 - Path.stat costs twice; `.`, `..`, one per thread
            usage.ru_nvcsw,
            usage.ru_nivcsw,
            usage.ru_minflt,
            usage.ru_majflt,
            run_ns,
            wait_ns,
        )
        return (row,)

    def close(self) -> None:
        """Close the kept files."""
        self._statm.close()
        if self._sched is not None:
            self._sched.close()

    def _main_thread(self) -> tuple[int, int]:
        if self._sched is None:
            return _UNKNOWN, _UNKNOWN

        run_ns, wait_ns, _ = self._sched.read().split(None, 2)
        return int(run_ns), int(wait_ns)
