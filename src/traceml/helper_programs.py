"""Helper programs of ours: the commands that start them, their priority, and their end."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import threading
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator
    from subprocess import Popen

__all__ = [
    "change_command_line",
    "end_process",
    "exit_process",
    "helper_program",
    "importing",
    "lower_priority",
    "search_working_directory",
    "without_debugger",
]

_LOWEST = 19


def helper_program(module: str, *arguments: str, unbuffered: bool = False) -> list[str]:
    """Return the command that runs a module of ours in a process of its own.

    `-P` keeps the working directory off its path: it is where users have their `queue.py` or `json.py`.
    Processes that load what users name call `search_working_directory`.

    Args:
        module: its name, as for `python -m`.
        unbuffered: what it prints appears at once, in a file too.
    """
    return [sys.executable, "-uP" if unbuffered else "-P", "-m", module, *arguments]


def change_command_line(words: list[str]) -> None:
    """Show another command line of this process, in `ps` and `/proc/PID/cmdline`; what is too long is cut off.

    A fork has the one of its parent, and who looks for that one by its command line, to end it, must not find two. The
    kernel shows the memory in which the arguments lie (proc(5), `arg_start` and `arg_end`).
    """
    import ctypes

    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    text = b"\0".join(map(os.fsencode, words))[: end - start - 1]
    ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


def without_debugger() -> AbstractContextManager[Any]:
    """Return a context in which this process starts programs that the debugger of its script leaves alone.

    pydevd, of VS Code and PyCharm, changes the command line of Python programs, so that it debugs them too: with
    threads, after which a fork in them may never return, and as a session that the user did not ask for.
    """
    debugger = sys.modules.get("_pydev_bundle.pydev_monkey")
    return getattr(debugger, "skip_subprocess_arg_patch", nullcontext)()


@contextmanager
def importing() -> Iterator[None]:
    """Search for no garbage while a program of ours imports, nor later in what was imported: all modules stay."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.freeze()  # else the first search of all comes at once: 6 ms
            gc.enable()


def end_process(process: Popen[Any], timeout_s: float) -> None:
    """Wait for the end of a process that was asked to end; kill it after the timeout."""
    if process.poll() is None:
        _await_end(process, timeout_s)

    if process.poll() is None:
        process.kill()

    process.wait()


def _await_end(process: Popen[Any], timeout_s: float) -> None:
    """Wait for the end of a process: `Popen.wait` with a timeout would notice it up to 50 ms later."""
    import select
    from subprocess import TimeoutExpired

    try:
        ended = os.pidfd_open(process.pid)
    except OSError:  # a kernel before 5.3
        with suppress(TimeoutExpired):
            process.wait(timeout_s)

        return

    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.poll(timeout_s * 1000)
    os.close(ended)


def exit_process(status: int) -> NoReturn:
    """End this process as the interpreter does, but take no module apart, for which somebody would wait.

    This takes 30 ms of a command of 0.2 s, and up to a second where torch is loaded.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # its reader is gone, or it was closed
            stream.flush()

    os._exit(status)


def search_working_directory() -> None:
    """Let this process find modules of the user, such as a tracker: after all that are installed."""
    with suppress(OSError):  # the folder is gone
        sys.path.append(str(Path.cwd()))


def lower_priority(nice: int = _LOWEST) -> None:
    """Lower the CPU priority of this process; do nothing where the system refuses that.

    Linux groups processes by session (autogroup), and `nice` counts only among the processes of one session. So a
    process that leads a session makes its session nice too.
    """
    try:
        os.nice(nice)
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except OSError:
        pass

    if os.getsid(0) != os.getpid():
        return  # the session has other processes too

    try:
        Path("/proc/self/autogroup").write_text(str(nice))
    except OSError:  # a kernel without groups
        pass
