"""Finding and ending the processes that a job has left on this host.

Process: launcher (which sends its source to the host of a lost agent), agent, its parent (`agent/reaper.py`), zygote.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator

from traceml.inspection.kernel_state import ProcessInfo, is_running, process_info

__all__ = [
    "AGENT_NAME",
    "MARK",
    "ProcessTermination",
    "become_subreaper",
    "end_job",
    "ended_children",
    "find_leftovers",
    "terminate_all",
]

AGENT_NAME = "traceml-agent"
"""Last argument of the command line of an agent and its reaper."""

# Environment variable of all processes of a job, also of those that left its session.
MARK = "TRACEML_LAUNCH_MARK"
_OUTLIVES = b"TRACEML_OUTLIVES=1"
_PR_SET_CHILD_SUBREAPER = 36
_TICK_S, _LATE_TICK_S = 0.01, 0.1  # a search reads files of every process of the host
_LATE_S = 1.0
_KILLED_S = 5.0  # longest wait for processes that SIGKILL does not end


def become_subreaper() -> None:
    """Make orphans below us our children, so that they can be found and waited for."""
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def find_leftovers(roots: Iterable[int], *, mark: str | None, spare: Iterable[int] = ()) -> set[int]:
    """Return the living descendants of `roots`, and all processes with the mark, except those that may outlive a job.

    These are an aggregator that a worker started for its logged values, and its delivery processes: they end by
    themselves.

    Args:
        roots: their descendants count; they themselves do not.
        mark: the value of `TRACEML_LAUNCH_MARK` by which processes outside the tree are found.
        spare: processes that do not count, though their descendants do.
    """
    children: dict[int, list[ProcessInfo]] = {}
    names = os.listdir("/proc")  # noqa: PTH208 - hundreds of names, many times a second
    every = [process for name in names if name.isdigit() and (process := process_info(name)) is not None]
    for process in every:
        children.setdefault(process.parent, []).append(process)

    found: set[int] = set()
    todo = list(roots)
    while todo:
        for child in children.get(todo.pop(), ()):
            if child.pid not in found and not _has_variable(child.pid, _OUTLIVES):
                todo.append(child.pid)
                if child.state not in "ZX":
                    found.add(child.pid)

    if mark:
        word = f"{MARK}={mark}".encode()
        found |= {each.pid for each in every if each.state not in "ZX" and _has_variable(each.pid, word)}

    return found - set(spare) - {os.getpid()}


class ProcessTermination:
    """Ends processes until none is found: by SIGTERM, after a grace period by SIGKILL.

    Args:
        grace_s: time between SIGTERM and SIGKILL; 0 kills at once.
        asks: whether SIGTERM is sent now; another may have sent it.
    """

    def __init__(
        self, find: Callable[[], set[int]], *, grace_s: float, asks: Callable[[], bool] = lambda: True
    ) -> None:
        self._find, self._grace_s, self._asks = find, grace_s, asks
        self._start_s = time.monotonic()
        self._limit_s = grace_s + _KILLED_S
        self._asked: set[int] = set()
        self._known: set[int] = set()
        self.left: set[int] = set()

    @property
    def pause_s(self) -> float:
        """Time until the next step: longer where the end takes long."""
        return _TICK_S if time.monotonic() - self._start_s < _LATE_S else _LATE_TICK_S

    def step(self) -> bool:
        """Search and send signals; return whether it is finished; `left` holds processes that could not be ended."""
        found = self._find()
        # A process loses its environment, by which it was found, some time before it has ended.
        self.left = found | {pid for pid in self._known - found if is_running(pid)}
        passed_s = time.monotonic() - self._start_s
        if not self.left or passed_s > self._limit_s:
            return True

        if passed_s >= self._grace_s:
            _signal(found, signal.SIGKILL)
        elif self._asks():
            _signal(found - self._asked, signal.SIGTERM)
            self._asked |= found

        self._known |= found
        return False


def terminate_all(find: Callable[[], set[int]], *, grace_s: float, asks: Callable[[], bool] = lambda: True) -> None:
    """End the processes that `find` returns, and wait; see `ProcessTermination`."""
    ending = ProcessTermination(find, grace_s=grace_s, asks=asks)
    while not ending.step():
        time.sleep(ending.pause_s)
        for _ in ended_children():  # orphans that became ours
            pass


def ended_children() -> Iterator[tuple[int, int]]:
    """Reap the children that have ended; yield the process id and the status, as `waitpid` returns it, of each."""
    with contextlib.suppress(ChildProcessError):  # there are none
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            yield ended


def end_job(mark: str, agent: int) -> None:
    """End an agent that was lost, its reaper, and all processes that have the mark of its job.

    Args:
        agent: the agent's process id; a process without the agent's name is left alone.
    """
    known = process_info(agent)
    agents = {agent} if known is None else {agent, known.parent}
    terminate_all(lambda: {*filter(_is_agent, agents), *find_leftovers([], mark=mark)}, grace_s=0)


def _is_agent(pid: int) -> bool:
    if not is_running(pid):
        return False

    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read().split(b"\0")[-2:-1] == [AGENT_NAME.encode()]

    return False


def _signal(pids: Iterable[int], how: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, how)
            os.kill(pid, signal.SIGCONT)  # a stopped process does not handle SIGTERM
        except (ProcessLookupError, PermissionError):
            continue


def _has_variable(pid: int, word: bytes) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return word in file.read().split(b"\0")
    except OSError:  # gone, or another user's
        return False
