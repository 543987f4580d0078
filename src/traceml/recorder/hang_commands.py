"""Commands of the aggregator to a rank of a job that is stuck: to say so, and to end where `on_hang` is `abort`."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Mapping
from threading import Thread
from typing import Any

from traceml.fail_open import print_notice
from traceml.inspection.kernel_state import end_started_processes
from traceml.inspection.loaded_modules import loaded_module
from traceml.transport.run_line import stuck_line

__all__ = ["abort_process", "print_stuck"]

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
    if (processes := loaded_module("multiprocessing")) is not None:
        for child in processes.active_children():
            if child.daemon:
                child.kill()

    end_started_processes(os.getpid())
    os.kill(os.getpid(), signal.SIGTERM)


def print_stuck(args: Mapping[str, Any], on_printed: Callable[[], object]) -> dict[str, Any]:
    """Print that the job is stuck, or continues; in a thread of its own, as nobody may read the pipe of standard error.

    Args:
        args: see `stuck_line`.
        on_printed: called in that thread, as this line is no output of the script.
    """
    line = stuck_line(args)

    def show() -> None:
        print_notice(line)
        on_printed()

    Thread(target=show, name="traceml-notice", daemon=True).start()
    return {}
