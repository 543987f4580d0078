"""Loader workers that die: torch's handler of SIGCHLD raises in the training process, which the script may catch.

Once the script has ended, the handler would interrupt the report of its end: then it does not raise.
"""

from __future__ import annotations

import logging
import os
import re
from collections import deque
from typing import Any

from traceml.clock import monotonic_ns
from traceml.database.schema import Slot
from traceml.fail_open import fail_open
from traceml.instrument.importlib_bootstrap import uncounted
from traceml.instrument.patches import Patches
from traceml.instrument.step_clock import StepClock
from traceml.instrument.workers.loader_workers import worker_pids

__all__ = ["watch_workers"]

_log = logging.getLogger("traceml")
_PID = re.compile(r"\(pid (\d+)\)")
_KILLED = (os.CLD_KILLED, os.CLD_DUMPED)


@uncounted
def watch_workers(patches: Patches, clock: StepClock, lost: deque[dict[str, Any]]) -> None:
    """Append the facts of each loader worker that dies: its process, number, step, and signal or status.

    Args:
        lost: receives the facts. They come from a signal handler, which may interrupt code that holds a lock, so
            nothing more is done with them here.
    """
    from torch.utils.data._utils import signal_handling

    handling: Any = signal_handling
    check = handling._error_if_any_worker_fails

    def _error_if_any_worker_fails() -> None:
        try:
            check()
        except RuntimeError as error:
            with fail_open(_log, "instrument", "the death of a loader worker is not recorded", once=True):
                lost.append(_facts(str(error), clock))

            if not clock.open_slots[Slot.EXIT_START]:
                raise

    patches.wrap(handling, "_error_if_any_worker_fails", _error_if_any_worker_fails)


def _facts(text: str, clock: StepClock) -> dict[str, Any]:
    found = _PID.search(text)
    pid = int(found[1]) if found else 0
    facts: dict[str, Any] = {"t_ns": monotonic_ns(), "pid": pid, "message": text.strip()[:200]}
    step = clock.open_slots[Slot.STEP]
    if step >= 0:
        facts["step"] = step

    return facts | _number(pid) | _status(pid)


def _number(pid: int) -> dict[str, Any]:
    for group in worker_pids():
        if pid in group.pids:
            return {"worker": group.pids.index(pid), "workers": len(group.pids)}

    return {}


def _status(pid: int) -> dict[str, Any]:
    """Return the signal or the exit status of a child, which stays there for torch to collect."""
    try:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) if pid else None
    except ChildProcessError:  # collected already
        return {}

    if ended is None:
        return {}

    return {"signal" if ended.si_code in _KILLED else "code": ended.si_status}
