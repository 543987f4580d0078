"""The process that another one waits for: its child, or the holder of a file's lock."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from traceml.inspection.kernel_state import children_of, current_syscall, is_running, read_text, wait_state
from traceml.inspection.program_names import program_name

__all__ = ["blocking_process", "file_lock_holder", "skip_shells"]

# wait4 has the child's number in its first argument, waitid (with P_PID in its first) in its second.
_WAIT4 = {"x86_64": 61, "aarch64": 260}
_WAITID = {"x86_64": 247, "aarch64": 95}
_P_PID = 1
_LOCKS = Path("/proc/locks")
_BLOCKED = "->"
_SHELLS = ("sh", "dash", "bash", "zsh", "ksh", "ash")
_MAX_SHELLS = 8  # one in the other


def blocking_process(pid: int, thread: int, locks: Path = _LOCKS) -> int | None:
    """Return the id of the process that a thread waits for; None if it waits for none, or that is not known.

    Instead of a shell that itself waits, the program that the shell waits for.
    """
    call = current_syscall(thread)
    machine = platform.machine()
    if call[:1] == (_WAIT4.get(machine),) and len(call) > 1:
        return skip_shells(_number(call[1]))

    if call[:2] == (_WAITID.get(machine), _P_PID) and len(call) > 2:
        return skip_shells(_number(call[2]))

    return _lock_holder(pid, locks)


def file_lock_holder(path: str) -> int | None:
    """Return the process that has a lock on a file; None if none has, as where the file itself is the lock."""
    try:
        status = os.stat(path)  # noqa: PTH116 - the path of another library
    except OSError:
        return None

    file = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    held = (words for words in _lock_lines(_LOCKS) if words[5:6] == [file] and words[1:2] != [_BLOCKED])
    return next((int(words[4]) for words in held if words[4].isdecimal() and words[4] != "0"), None)


def skip_shells(pid: int | None) -> int | None:
    """Return the program that a shell runs, in place of the shell; the shell if it runs several."""
    for _ in range(_MAX_SHELLS):
        program = None if pid is None else _run_by_shell(pid)
        if program is None:
            break

        pid = program

    return pid


def _run_by_shell(pid: int) -> int | None:
    """Return the only program that a waiting shell can wait for; None of another process, or where there are several.

    A program of a pipeline that waits for its pipe waits for another one of the pipeline.
    """
    call = current_syscall(pid)[:1]
    machine = platform.machine()
    if program_name(pid) not in _SHELLS or call not in ((_WAIT4.get(machine),), (_WAITID.get(machine),)):
        return None

    running = list(filter(is_running, children_of(pid)))
    others = [child for child in running if "pipe" not in wait_state(child).wchan]
    found = others or running
    return found[0] if len(found) == 1 else None


def _number(argument: int) -> int | None:
    """Return the id of a process; None for a group of processes, or any child."""
    signed = (argument & 0xFFFFFFFF) - (argument & 0x80000000) * 2
    return signed if signed > 0 else None


def _lock_holder(pid: int, locks: Path) -> int | None:
    """Return the process that has the lock which a process waits for.

    A line is `1: FLOCK ADVISORY WRITE 4711 08:01:1234 0 EOF`; those that wait have its number, and `->` before `FLOCK`.
    """
    lines = _lock_lines(locks)
    awaited = {words[0] for words in lines if words[1:2] == [_BLOCKED] and words[5:6] == [str(pid)]}
    holders = (words[4] for words in lines if words[0] in awaited and words[1:2] != [_BLOCKED] and len(words) > 4)
    holder = next((int(each) for each in holders if each.isdecimal()), None)
    return holder or None


def _lock_lines(locks: Path) -> list[list[str]]:
    return [line.split() for line in read_text(str(locks)).splitlines()]
