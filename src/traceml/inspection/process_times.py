"""CPU time of this process, divided into that of its Python threads and that of other threads."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import NamedTuple, Self

from traceml.clock import own_time as time
from traceml.inspection.kernel_state import thread_cpu_ns
from traceml.inspection.thread_frames import number_of

__all__ = ["ProcessTimes", "python_threads_ns"]


def python_threads_ns() -> dict[int, int]:
    """Return the CPU time of each Python thread of this process, by its identifier."""
    used = {each.ident or 0: thread_cpu_ns(number_of(each)) for each in threading.enumerate()}
    return {ident: used_ns for ident, used_ns in used.items() if used_ns is not None}


class ProcessTimes(NamedTuple):
    """CPU time of the process, and of each of its Python threads."""

    process_ns: int
    threads_ns: Mapping[int, int]

    @classmethod
    def read(cls) -> Self:
        """Read both."""
        return cls(time.process_time_ns(), python_threads_ns())

    def of_libraries_since(self, before: ProcessTimes) -> int:
        """Return the CPU time since an earlier reading of threads that are not Python's, as those of a library's pool.

        What a thread used that has started since is all of that time.
        """
        python_ns = sum(used_ns - before.threads_ns.get(ident, 0) for ident, used_ns in self.threads_ns.items())
        return max(self.process_ns - before.process_ns - python_ns, 0)
