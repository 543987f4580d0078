"""The rank's own process: memory, CPU time, threads, switches, page faults, and how long its main thread waited."""

from __future__ import annotations

import os
import resource
import time
from typing import ClassVar

from traceml.database.schema import PROCESS, Table
from traceml.samplers.base import SampleRow
from traceml.samplers.procfs import ProcFile

__all__ = ["ProcessSampler"]

_UNKNOWN = -1
# Fields of /proc/self/stat behind the command's name, which is in parentheses and may hold anything.
_MINOR_FAULTS, _MAJOR_FAULTS, _THREADS, _RESIDENT_PAGES = 7, 9, 17, 21


class ProcessSampler:
    """Samples this process.

    Each read of a file gives up the interpreter's lock, and getting it back from a busy training thread costs more than
    the read (20-40 us): one file tells memory, threads and faults, one the main thread's waiting; the rest are calls
    that keep the lock.

    Raises:
        OSError: there is no /proc.
    """

    name: ClassVar[str] = "process"
    table: ClassVar[Table] = PROCESS
    start_interval_s: ClassVar[float | None] = 0.5
    cost_us: ClassVar[float] = 60.0

    def __init__(self) -> None:
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")
        self._stat = ProcFile("/proc/self/stat", 1024)
        # The main thread has the process's id; the kernel may be built without these figures.
        try:
            self._sched: ProcFile | None = ProcFile(f"/proc/self/task/{os.getpid()}/schedstat", 256)
        except OSError:
            self._sched = None

    def sample(self, t_ns: int, step: int) -> tuple[SampleRow]:
        """Return the one row of this moment."""
        stat = self._stat.read()
        fields = stat[stat.rindex(b")") + 2 :].split(None, _RESIDENT_PAGES + 1)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        run_ns, wait_ns = self._main_thread()
        row = (
            t_ns,
            step,
            int(fields[_RESIDENT_PAGES]) * self._page_bytes,
            time.process_time_ns(),
            int(fields[_THREADS]),
            usage.ru_nvcsw,
            usage.ru_nivcsw,
            int(fields[_MINOR_FAULTS]),
            int(fields[_MAJOR_FAULTS]),
            run_ns,
            wait_ns,
        )
        return (row,)

    def close(self) -> None:
        """Close the kept files."""
        self._stat.close()
        if self._sched is not None:
            self._sched.close()

    def _main_thread(self) -> tuple[int, int]:
        if self._sched is None:
            return _UNKNOWN, _UNKNOWN

        run_ns, wait_ns, _ = self._sched.read().split(None, 2)
        return int(run_ns), int(wait_ns)
