"""Python stacks of a process whose own thread cannot report them: faulthandler writes them on a signal.

faulthandler reads the frames of all threads without the GIL. A process in which another thread runs Python code crashes
after 3 to 80 such signals. So only a silent process gets one: its thread asks for the GIL in vain, and no two other
threads run in turns, so one holds it inside one call into C, and no frame changes. The signal is sent to one thread:
one to the process would end a wait of the user's C code early.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path

from traceml.clock import own_time as time
from traceml.fail_open import fail_open
from traceml.inspection.kernel_state import (
    HALTED_STATES,
    process_info,
    read_status,
    read_text,
    thread_cpu_ns,
    threads_of,
)

__all__ = [
    "STACK_SIGNAL",
    "ReportingInit",
    "SignaledStacks",
    "create_stack_file",
    "find_stack_file",
    "is_registered",
    "register",
    "signal_target",
]

STACK_SIGNAL = signal.SIGRTMAX - 3
"""Makes a process's faulthandler write its Python stacks. SIGUSR1 and SIGUSR2 stay free for the user."""

_NAME = "traceml-stacks"
_MAX_BYTES = 1024 * 1024
# A thread that waits for the GIL wakes at each switch interval, 5 ms, to ask for it again. One that waits for anything
# else sleeps on.
_PROBE_S, _MIN_WAKES = 0.1, 8
# Where others use the cores it wakes less often: then another probe may do.
_PROBES_S = 0.45
# A thread hands the GIL over after a switch interval on a core, while another one wants it. One that runs for three
# of them, and no other does, holds it in one call. What only wakes to ask for it runs for about as long as the silent
# thread does: 0.3 ms in a probe, and 7 ms where the call began during a short switch interval (`SwitchInterval`).
_RUNS_NS, _HOLDS_NS, _ASKS_NS = 1_000_000, 15_000_000, 10_000_000
_FIRST_S, _QUIET_S = 0.3, 0.05
# The thread that writes may wait for a core between two lines: half of the stacks looks like those of fewer threads.
_NO_CORE_S = 0.4
# A signal ends the waits of these system calls in user code: sleep, poll, select, epoll.
_ENDED_EARLY = {
    "x86_64": {"7", "23", "35", "230", "232", "270", "271", "281"},
    "aarch64": {"22", "72", "73", "101", "115"},
}


def create_stack_file() -> int:
    """Return the descriptor of a new file in memory for a process's stacks.

    A file, as a pipe would be full before the main thread's stack, which faulthandler writes last.
    """
    file = os.memfd_create(_NAME, os.MFD_CLOEXEC)
    fcntl.fcntl(file, fcntl.F_SETFL, os.O_APPEND)  # whoever empties it does not share the writer's position
    return file


def register(file: int) -> None:
    """Have faulthandler write this process's stacks into a file of `create_stack_file` on `STACK_SIGNAL`."""
    faulthandler.register(STACK_SIGNAL, file=file, all_threads=True, chain=False)


def is_registered(pid: int) -> bool:
    """Whether a process handles `STACK_SIGNAL`: else it would die of it."""
    caught = read_status(pid, "SigCgt") or "0"
    return bool(int(caught, 16) >> (STACK_SIGNAL - 1) & 1)


def find_stack_file(pid: int) -> int | None:
    """Open the file of another process's stacks; None without one, or where its files may not be read."""
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if str(link.readlink()).startswith(f"/memfd:{_NAME}"):
                    return os.open(link, os.O_RDWR | os.O_CLOEXEC)

    return None


def signal_target(pid: int, *, even_if_disturbed: bool = False) -> int | None:
    """Return the thread of a stuck loader worker that may get the signal; None if it may do harm.

    Args:
        even_if_disturbed: whether a wait of its main thread in C, such as `sleep` or `poll`, may end early.
    """
    threads = threads_of(pid)
    if not threads or sum(each.state == "R" for each in threads) > 1 or threads[0].state in HALTED_STATES:
        return None

    if threads[0].state == "R":
        return pid

    call = read_text(f"/proc/{pid}/syscall").partition(" ")[0].strip()
    waits_safely = even_if_disturbed or bool(call and call not in _ENDED_EARLY.get(os.uname().machine, {call}))
    return threads[1].pid if len(threads) > 1 else pid if waits_safely else None


class SignaledStacks:
    """One request for the stacks of a process, by the signal. `step` is called every few milliseconds until it is over.

    Args:
        file: the file that its faulthandler writes; None for one that is only looked at, not sent the signal.
        silent_thread: its thread that should have answered; None for a loader worker, which has none.
        target: the thread that gets the signal, of a loader worker.
    """

    def __init__(
        self, pid: int, file: int | None, *, silent_thread: int | None = None, target: int | None = None
    ) -> None:
        self.text = ""
        """The stacks as faulthandler writes them, the main thread's last; empty if it was not safe to ask."""
        self.was_sent = False
        """Whether the signal was sent."""
        self.asks_for_gil = False
        """Whether the silent thread was seen to ask for the GIL in vain."""
        self._pid, self._file, self._silent_thread, self._target = pid, file, silent_thread, target
        self._wakes = self._wakes_of() if silent_thread is not None else 0
        self._ran_ns = self._run_times() if silent_thread is not None else {}
        self._probe_s = self._began_s = time.monotonic()
        self._sent_s, self._grown_s, self._grown_ns, self._size = 0.0, 0.0, 0, 0

    def step(self) -> bool:
        """Go on; return whether it is over."""
        now_s = time.monotonic()
        if self._sent_s and self._file is not None:
            return self._is_written(now_s, self._file)
        if self._silent_thread is not None and now_s - self._probe_s < _PROBE_S:
            return False

        if not self._send():
            self._probe_s = now_s
            self._wakes = self._wakes_of() if self._silent_thread is not None else 0
            return self._silent_thread is None or now_s - self._began_s >= _PROBES_S

        self.was_sent = True
        self._sent_s = now_s
        self._note_growth(now_s, 0)
        return False

    def wait(self, timeout_s: float = 1.0) -> str:
        """Wait until it is over; return the text."""
        deadline_s = time.monotonic() + timeout_s
        while not self.step() and time.monotonic() < deadline_s:
            time.sleep(0.005)

        return self.text

    def _send(self) -> bool:
        """Send the signal; return False if it is not safe now."""
        target = self._target if self._silent_thread is None else self._target_of_silent()
        if target is None or self._file is None or not is_registered(self._pid):
            return False

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # another process may ask too
            os.ftruncate(self._file, 0)
        except OSError:
            return False

        import ctypes

        self._target = target
        return bool(ctypes.CDLL(None).tgkill(self._pid, target, int(STACK_SIGNAL)) == 0)

    def _target_of_silent(self) -> int | None:
        """Return the thread for the signal: the main one if it runs, so is not in a wait; else the one that was asked.

        A stopped process would handle the signal later, when it runs again.
        """
        main = process_info(self._pid)
        if main is None or main.state in HALTED_STATES:
            return None

        self.asks_for_gil = self._wakes_of() - self._wakes >= _MIN_WAKES
        # Threads of Python code run in turns: it is not safe to ask, and the silent one may answer.
        if not self.asks_for_gil or self._run_in_turns():
            return None

        return self._pid if main.state == "R" else self._silent_thread

    def _run_in_turns(self) -> bool:
        """Return whether more than one other thread has run, or none for long enough to tell, or the silent one."""
        ran = {thread: ran_ns - self._ran_ns.get(thread, 0) for thread, ran_ns in self._run_times().items()}
        asked_ns = ran.pop(self._silent_thread, 0)
        running = [ran_ns for ran_ns in ran.values() if ran_ns > _RUNS_NS + asked_ns]
        return asked_ns > _ASKS_NS or len(running) > 1 or (len(running) == 1 and running[0] < _HOLDS_NS)

    def _run_times(self) -> dict[int | None, int]:
        """Return the CPU time of each thread."""
        threads = (each.pid for each in threads_of(self._pid))
        return {thread: cpu_ns for thread in threads if (cpu_ns := thread_cpu_ns(thread, self._pid)) is not None}

    def _wakes_of(self) -> int:
        return int(read_status(self._pid, "voluntary_ctxt_switches", self._silent_thread) or 0)

    def _is_written(self, now_s: float, file: int) -> bool:
        """Whether faulthandler has written everything."""
        size = os.fstat(file).st_size
        if size != self._size:
            self._note_growth(now_s, size)

        quiet_s = now_s - self._grown_s
        if quiet_s <= (_QUIET_S if size else _FIRST_S):
            return False

        if not self._has_no_core():
            self.text = os.pread(file, _MAX_BYTES, 0).decode("utf-8", "replace")
        elif quiet_s <= _NO_CORE_S:
            return False

        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)

        return True

    def _note_growth(self, now_s: float, size: int) -> None:
        self._grown_s, self._size = now_s, size
        self._grown_ns = thread_cpu_ns(self._target or self._pid, self._pid) or 0

    def _has_no_core(self) -> bool:
        """Return whether the thread that writes could not run since the text has grown last, though it would."""
        ran_ns = thread_cpu_ns(self._target or self._pid, self._pid)
        is_waiting = read_status(self._pid, "State", self._target)[:1] in ("R", "T", "t")
        return is_waiting and ran_ns is not None and ran_ns - self._grown_ns < _HOLDS_NS


_log = logging.getLogger("traceml")


class ReportingInit:
    """A `worker_init_fn` that registers the worker's stacks, starts what is wanted there, and calls the user's own.

    Attributes:
        original: the user's; None without one.
        start: called in the worker, without raising; None for nothing.
    """

    def __init__(self, original: Callable[[int], object] | None, start: Callable[[], object] | None = None) -> None:
        self.original, self.start = original, start

    def __call__(self, worker: int) -> None:
        """Set up the worker of this number, in its process."""
        with fail_open(_log, "inspection", "the stacks of a loader worker cannot be reported"):
            if not is_registered(os.getpid()):
                register(create_stack_file())

        if self.start is not None:
            self.start()

        if self.original is not None:
            self.original(worker)
