"""Wait before a gloo process group is destroyed, which can deadlock inside torch.

A backward pass leaves a Python object with each collective that it starts. One of gloo's threads frees it after the
collective and needs the GIL for that; the group's destructor waits for this thread and holds the GIL.
"""

from __future__ import annotations

import os
import sys

from traceml.clock import own_time as time
from traceml.inspection.kernel_state import process_info, read_status, threads_of

__all__ = ["await_gloo_threads"]

_NAME = "pt_gloo_runloop"
_LIMIT_S, _LONGEST_S = 10.0, 0.1


def await_gloo_threads(limit_s: float = _LIMIT_S) -> None:
    """Wait without the GIL until gloo's threads in this process have freed what they hold; 10 ms if they have.

    Args:
        limit_s: the longest wait, in seconds, for threads that stay busy.
    """
    own = os.getpid()
    threads = [each.pid for each in threads_of(own) if read_status(own, "Name", each.pid) == _NAME]
    if not threads:
        return

    deadline_s = time.monotonic() + limit_s
    before = _switch_counts(threads)
    while time.monotonic() < deadline_s:
        # A thread that wants the GIL wakes at each switch interval to ask again. Nothing tells us when it has got it.
        time.sleep(min(2 * sys.getswitchinterval(), _LONGEST_S))
        now = _switch_counts(threads)
        if now is not None and now == before:
            return

        before = now


def _switch_counts(threads: list[int]) -> list[str] | None:
    """Return how often each of the threads has gone to sleep; None if one of them runs."""
    if any(info is not None and info.state in "RD" for info in map(process_info, threads)):
        return None

    return [read_status(os.getpid(), "voluntary_ctxt_switches", thread) for thread in threads]
