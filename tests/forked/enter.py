"""Run a command inside another process's namespaces, as its only child, and end as it ends.

    python -SE enter.py PID COMMAND [ARGUMENT ...]

Signals of a terminal reach both; only the command acts on them. Used by `Popen` of `client`; forked processes call
`enter`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_KINDS = ("net", "uts", "pid", "mnt")  # mnt last: after it, /proc is the other one


__all__ = ["enter"]


def main(target: str, *command: str) -> None:
    enter(int(target))
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")


def enter(target: int) -> None:
    """Fork a child inside the namespaces of a process; return in it. This process ends as the child ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    folder = os.getcwd()  # noqa: PTH109 - pathlib would cost more than the command
    for number in [os.open(f"/proc/{target}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in _KINDS]:
        if libc.setns(number, 0):
            raise OSError(ctypes.get_errno(), f"setns into {target}")

        os.close(number)

    os.chdir(folder)
    child = os.fork()
    if child == 0:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        return

    _follow(child)


def _follow(child: int) -> None:
    """End as a child ends."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
    os.closerange(0, os.sysconf("SC_OPEN_MAX"))  # whoever reads the command's output sees its end
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)

        os.kill(os.getpid(), number)

    os._exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(*sys.argv[1:])
