"""Process samples: memory, CPU time, threads, switches, page faults, and the wait time of the main thread."""

from __future__ import annotations

import os
import resource
import time
from typing import ClassVar

from traceml.database.schema import PROCESS, Table
from traceml.samplers.base import Sampler, SampleRow
from traceml.samplers.procfs import ProcFile, open_if_visible

__all__ = ["ProcessSampler"]

_UNKNOWN = -1
# Fields of /proc/self/stat after the command's name, which is in parentheses and may contain any character.
_MINOR_FAULTS, _MAJOR_FAULTS, _THREADS, _RESIDENT_PAGES = 7, 9, 17, 21


class ProcessSampler(Sampler):
    """Samples this process.

    Each read of a file releases the GIL, and taking it back from a busy training thread costs more than the read
    (20-40 us). So there are two files: one for memory, threads and faults, one for the main thread's wait time; the
    other values come from calls that keep the GIL.

    Raises:
        OSError: there is no /proc.
    """

    name: ClassVar[str] = "process"
    table: ClassVar[Table] = PROCESS
    start_interval_s: ClassVar[float | None] = 0.5

    def __init__(self) -> None:
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")
        self._stat = ProcFile("/proc/self/stat", 1024)
        # The main thread has the process's id; a kernel may lack these figures.
        self._sched = open_if_visible(f"/proc/self/task/{os.getpid()}/schedstat", 256)

    def sample(self, t_ns: int, step: int) -> tuple[SampleRow]:
        """Return one row."""
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
        """Close the open files."""
        self._stat.close()
        if self._sched is not None:
            self._sched.close()

    def _main_thread(self) -> tuple[int, int]:
        if self._sched is None:
            return _UNKNOWN, _UNKNOWN

        run_ns, wait_ns, _ = self._sched.read().split(None, 2)
        return int(run_ns), int(wait_ns)
