"""Process samples: memory, CPU time, threads, switches, page faults, and the wait time of the training thread."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import ClassVar

from traceml.clock import own_time as time
from traceml.database.schema import PROCESS, Table
from traceml.inspection.thread_frames import thread_number
from traceml.samplers.base import Sampler, SampleRow
from traceml.samplers.procfs import ProcFile, open_if_visible

__all__ = ["ProcessSampler"]

_UNKNOWN = -1
# Fields of /proc/self/stat after the command's name, which is in parentheses and may contain any character.
_MINOR_FAULTS, _MAJOR_FAULTS, _THREADS, _RESIDENT_PAGES = 7, 9, 17, 21


class ProcessSampler(Sampler):
    """Samples this process.

    Each read of a file releases the GIL, and taking it back from a busy training thread costs more than the read
    (20-40 us). So there are two files: one for memory, threads and faults, one for the training thread's wait time;
    the other values come from calls that keep the GIL.

    Args:
        training_thread: returns Python's number of the thread that trains; by default the main one.

    Raises:
        OSError: there is no /proc.
    """

    name: ClassVar[str] = "process"
    table: ClassVar[Table] = PROCESS
    start_interval_s: ClassVar[float | None] = 0.5

    def __init__(self, training_thread: Callable[[], int | None] = lambda: threading.main_thread().ident) -> None:
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")
        self._stat = ProcFile("/proc/self/stat", 1024)
        self._training_thread = training_thread
        self._thread: int | None = None
        self._sched: ProcFile | None = None  # a kernel may lack these figures
        self._run_ns, self._wait_ns = _UNKNOWN, _UNKNOWN
        # what the threads that trained before had, less what this one had when it took over
        self._earlier = 0, 0

    def sample(self, t_ns: int, step: int) -> tuple[SampleRow]:
        """Return one row."""
        stat = self._stat.read()
        fields = stat[stat.rindex(b")") + 2 :].split(None, _RESIDENT_PAGES + 1)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self._read_thread()
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
            self._run_ns,
            self._wait_ns,
        )
        return (row,)

    def close(self) -> None:
        """Close the open files."""
        self._stat.close()
        if self._sched is not None:
            self._sched.close()

    def _read_thread(self) -> None:
        """Read how long the thread that trains has run and waited; where that has changed, both continue from there."""
        thread = self._training_thread()
        with suppress(OSError):  # the thread has ended
            if thread != self._thread and (number := thread_number(thread or 0)):
                self._follow(number)
                self._thread = thread

            if self._sched is not None:
                run_ns, wait_ns = _figures(self._sched)
                self._run_ns, self._wait_ns = self._earlier[0] + run_ns, self._earlier[1] + wait_ns

    def _follow(self, number: int) -> None:
        before, opened = self._sched, open_if_visible(f"/proc/self/task/{number}/schedstat", 256)
        if opened is not None and before is not None:
            run_ns, wait_ns = _figures(opened)
            self._earlier = self._run_ns - run_ns, self._wait_ns - wait_ns
            before.close()

        self._sched = opened or before


def _figures(sched: ProcFile) -> tuple[int, int]:
    run_ns, wait_ns, _ = sched.read().split(None, 2)
    return int(run_ns), int(wait_ns)
