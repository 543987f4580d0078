"""Words for the end of a process: a signal by its name, an exit code, or neither.

Imports nothing of traceml, so that errors, launcher, verdicts and screens can say it in the same words.
"""

from __future__ import annotations

import signal
import time

__all__ = ["CRASHES", "EndedBySignal", "end_of_status", "exit_text", "signal_name", "signal_text"]

CRASHES = frozenset((signal.SIGILL, signal.SIGABRT, signal.SIGFPE, signal.SIGSEGV))
"""Signals by which native code crashes; SIGBUS often is a lack of shared memory."""


class EndedBySignal(KeyboardInterrupt):
    """A signal asks a launcher for the end; like Ctrl-C, it ends the job on all hosts first.

    Attributes:
        number: of the signal.
        at_s: epoch seconds at which it came.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.at_s = number, time.time()


def signal_name(number: int) -> str:
    """Return `SIGKILL` for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def signal_text(number: int) -> str:
    """Return `signal 9 (SIGKILL)` for 9."""
    name = signal_name(number)
    return name if name.startswith("signal") else f"signal {number} ({name})"


def exit_text(code: int | None, ended_by: int | None = None) -> str:
    """Return how a process ended: `was killed by signal 9 (SIGKILL)`, `ended with exit code 3`, or `ended`.

    Args:
        code: its exit code; None where it is not known.
        ended_by: the signal that ended it; None where none did.
    """
    if ended_by is not None:
        return f"was killed by {signal_text(ended_by)}"

    return "ended" if code is None else f"ended with exit code {code}"


def end_of_status(status: int) -> str:
    """Return the same for a status as `subprocess` has it: an exit code, or a signal's number below zero."""
    return exit_text(None, -status) if status < 0 else exit_text(status)
