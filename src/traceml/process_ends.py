"""End of a process: requests for it by a signal, and words for a signal, an exit code, or neither.

Imports nothing of traceml, so that errors, launcher, verdicts and screens can say it in the same words.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

__all__ = [
    "BY_OTHERS",
    "CRASHES",
    "PR_SET_PDEATHSIG",
    "EndedBySignal",
    "StopRequest",
    "die_with_parent",
    "end_of_status",
    "ended_by",
    "exit_text",
    "forget_interrupts",
    "has_terminal",
    "ignore_slurm_warnings",
    "in_slurm_job",
    "interrupts_held",
    "not_ignored",
    "shell_status",
    "signal_name",
    "signal_text",
    "start_without_signals",
]

CRASHES = frozenset((signal.SIGILL, signal.SIGABRT, signal.SIGFPE, signal.SIGSEGV))
"""Signals by which native code crashes; SIGBUS often is a lack of shared memory."""
BY_OTHERS = frozenset((signal.SIGTERM, signal.SIGHUP))
"""Signals by which others end a job; by Ctrl-C and Ctrl-\\, a user ends it by hand."""
_SLURM_WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
"""Signals by which users have Slurm warn a job before its end (`--signal`)."""
PR_SET_PDEATHSIG = 1
"""Option of `prctl`: the signal that the kernel sends us when the thread that started us ends."""


class EndedBySignal(KeyboardInterrupt):
    """A signal asks a launcher for the end; like Ctrl-C, it ends the job on all hosts first.

    Attributes:
        at_s: epoch seconds at which it came.
        from_terminal: whether it came because this process's terminal was closed.
    """

    def __init__(self, number: int, *, from_terminal: bool = False) -> None:
        super().__init__()
        self.number, self.at_s, self.from_terminal = number, time.time(), from_terminal


def in_slurm_job() -> bool:
    """Return whether this process belongs to a job of Slurm, which sends its signals to all processes of each step."""
    return "SLURM_JOB_ID" in os.environ  # a batch script is a step, too, without the variable of one


def ignore_slurm_warnings() -> None:
    """Ignore the warnings of Slurm in a job of it: they are meant for scripts.

    All processes that descend from this one ignore them too, until a script handles them.
    """
    if in_slurm_job():
        for number in _SLURM_WARNINGS:
            signal.signal(number, signal.SIG_IGN)


def not_ignored(numbers: Iterable[signal.Signals]) -> set[signal.Signals]:
    """Return the signals that this process does not ignore; under `nohup` it ignores SIGHUP from its start."""
    return {number for number in numbers if signal.getsignal(number) != signal.SIG_IGN}


def has_terminal() -> bool:
    """Return whether this process has a controlling terminal that is not closed."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False

    return True


@contextmanager
def ended_by(*numbers: signal.Signals) -> Iterator[None]:
    """Raise `EndedBySignal` in the block on the first of these signals that is not_ignored; ignore later ones.

    A SIGQUIT that comes later ends the process at once: the way out of an end that hangs.
    """
    had_terminal = has_terminal()

    def end(number: int, _frame: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_DFL if each == signal.SIGQUIT else signal.SIG_IGN)

        raise EndedBySignal(number, from_terminal=number == signal.SIGHUP and had_terminal and not has_terminal())

    before = {number: signal.getsignal(number) for number in not_ignored(numbers)}
    for number in before:
        signal.signal(number, end)

    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back until the end of the block, which has to be completed; meanwhile `sigpending` shows it."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield  # it raises nothing here
        return

    def hold(number: int, _frame: object) -> None:
        signal.raise_signal(number)  # another thread has received it: now it is pending in this one

    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def forget_interrupts() -> None:
    """Drop a Ctrl-C that is held back."""
    while signal.sigtimedwait({signal.SIGINT}, 0) is not None:
        pass


def start_without_signals(thread: threading.Thread) -> None:
    """Start a thread that takes no signal of this process: the script may block one, to wait for it in its own threads.

    Real-time signals, of which one asks for stacks, and those of a crash reach it. A process that it starts takes
    none either, unless it unblocks them.

    Raises:
        OSError: no thread can be started.
    """
    usual = {each for each in signal.valid_signals() if each < signal.SIGRTMIN}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, usual - CRASHES - {signal.SIGBUS})
    try:
        thread.start()
    except RuntimeError as error:  # at a limit, at the interpreter's end, or in a subinterpreter
        raise OSError(str(error)) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class StopRequest:
    """An event that is set once, also by a handler of the thread that waits for it.

    `threading.Event.set` waits for a lock that `wait` holds for a moment: a handler that comes in this moment waits
    forever.
    """

    def __init__(self) -> None:
        self.is_set = False
        """Whether the stop was requested."""
        self._read_end, self._write_end = os.pipe()
        self._waiting = select.poll()
        self._waiting.register(self._read_end, select.POLLIN)

    def __call__(self, *_: object) -> None:
        """Request the stop. The arguments are those of a signal handler."""
        if not self.is_set:
            self.is_set = True
            os.write(self._write_end, b"\n")

    def __del__(self) -> None:
        """Close the pipe."""
        for descriptor in (self._read_end, self._write_end):
            os.close(descriptor)

    def wait(self, timeout_s: float) -> bool:
        """Wait for the request; return whether it was made."""
        if not self.is_set:
            self._waiting.poll(1000 * timeout_s)

        return self.is_set


def die_with_parent(parent: int, how: signal.Signals | int = signal.SIGKILL) -> None:
    """Have the kernel send us `how` when the thread that started us ends; 0 cancels that.

    Args:
        parent: our parent process; if it is gone already, this process ends now.
    """
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(how), 0, 0, 0)
    if how and os.getppid() != parent:
        os.kill(os.getpid(), how)


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
        code: its exit code; None if unknown.
        ended_by: the signal that ended it; None if none did.
    """
    if ended_by is not None:
        return f"was killed by {signal_text(ended_by)}"

    return "ended" if code is None else f"ended with exit code {code}"


def end_of_status(status: int) -> str:
    """Return the same for a status as `subprocess` has it: an exit code, or a signal's number below zero."""
    return exit_text(None, -status) if status < 0 else exit_text(status)


def shell_status(exitcode: int) -> int:
    """Return a shell's status of a process's exit code: 128 + n for signal n, whose code is -n."""
    return 128 - exitcode if exitcode < 0 else exitcode
