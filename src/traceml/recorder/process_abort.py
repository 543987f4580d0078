"""End of this process on the aggregator's command, when the job hangs and `on_hang` is `abort`."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from traceml.inspection.kernel_state import end_started_processes

__all__ = ["abort_process"]

_ANSWER_S, _KILL_S = 0.2, 5.0

_log = logging.getLogger("traceml")


def abort_process(call_later: Callable[[float, Callable[[], None]], None]) -> dict[str, Any]:
    """End this process by SIGTERM once the command is answered, and by SIGKILL if that has no effect.

    Args:
        call_later: calls a function after this many seconds.
    """
    _log.warning("the job hangs, and on_hang is abort: this process ends")
    call_later(_ANSWER_S, _terminate)
    call_later(_ANSWER_S + _KILL_S, lambda: os.kill(os.getpid(), signal.SIGKILL))
    return {"pid": os.getpid()}


def _terminate() -> None:
    """End this process with its loader's workers and the programs it has started: they would outlive it if stuck."""
    if (processes := sys.modules.get("multiprocessing")) is not None:
        for child in processes.active_children():
            if child.daemon:
                child.kill()

    end_started_processes(os.getpid())
    os.kill(os.getpid(), signal.SIGTERM)
