"""Samples of the loaders' worker processes: CPU time, waiting for a core, cores they may use, private memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar, NamedTuple

from traceml.clock import TICKS_PER_S
from traceml.database.schema import LOADER_WORKERS, Table
from traceml.samplers.base import SampleRow
from traceml.samplers.procfs import read_text

__all__ = ["EAGER_READS", "Groups", "LoaderWorkersSampler"]

Groups = Callable[[], Iterable[tuple[int, tuple[int, ...]]]]

STATE_SHARE = 0.001
"""Share of a core that reading the state of the workers may take."""
MEMORY_SHARE = 0.002
"""Share of a core that reading their private memory may take: the kernel walks all pages of a process, some 10 ms."""
EAGER_READS, _EAGER = 12, 10
"""So many first readings of memory may take ten times that share: a run of a minute has enough of them to judge."""
_UNKNOWN = -1
_TICK_NS = 10**9 // TICKS_PER_S
# Fields of /proc/PID/stat after the command's name, which is in parentheses and may contain any character.
_PARENT, _USER_TICKS, _SYSTEM_TICKS = 1, 11, 12


class _WorkerMemory(NamedTuple):
    private_bytes: int
    anonymous_bytes: int


class _Budget:
    """Tells when something may run again, so that it takes a share of a core."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._due_ns = 0

    def allows(self, t_ns: int) -> bool:
        """Return whether it may run now."""
        return t_ns >= self._due_ns

    def spent(self, t_ns: int, cost_ns: int) -> None:
        """Record a run and its CPU time."""
        self._due_ns = t_ns + int(cost_ns / self._share)


class LoaderWorkersSampler:
    """Samples the workers of each iterator, within a budget: the memory of one process at a time, in turns.

    Args:
        groups: returns (number of the loader, ids of its worker processes) of each iterator.
    """

    name: ClassVar[str] = "loader_workers"
    table: ClassVar[Table] = LOADER_WORKERS
    start_interval_s: ClassVar[float | None] = None

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._state, self._memory = _Budget(STATE_SHARE), _Budget(MEMORY_SHARE)
        self._parent = os.getpid()
        self._known: dict[int, _WorkerMemory] = {}
        self._turn = self._reads = 0
        self._read: int | None = None  # worker whose memory was read since the last rows

    def sample(self, t_ns: int, step: int) -> Iterator[SampleRow]:
        """Yield one row per iterator that has workers."""
        groups = self._groups()
        if not groups or not self._state.allows(t_ns):
            return

        began = time.thread_time_ns()
        pids = [pid for _, own in groups for pid in own]
        self._known = {pid: memory for pid, memory in self._known.items() if pid in pids}
        rows = [row for loader, own in groups if (row := self._row(t_ns, step, loader, own)) is not None]
        self._read = None
        self._state.spent(t_ns, time.thread_time_ns() - began)
        yield from rows
        if self._memory.allows(t_ns):
            self._read_memory(t_ns, pids)

    def close(self) -> None:
        """Do nothing: there are no resources."""

    def _row(self, t_ns: int, step: int, loader: int, pids: tuple[int, ...]) -> SampleRow | None:
        alive = {pid: ticks for pid in pids if (ticks := self._ticks(pid)) is not None}
        if not alive:
            return None

        memories = [self._known[pid] for pid in alive if pid in self._known]
        is_new = self._read in pids and len(memories) == len(alive)
        return (
            t_ns,
            step,
            loader,
            pids[0],
            len(alive),
            sum(alive.values()) * _TICK_NS,
            sum(map(_waited_ns, alive)),
            len(_cores(alive)),
            sum(memory.private_bytes for memory in memories) if is_new else _UNKNOWN,
            sum(memory.anonymous_bytes for memory in memories) if is_new else _UNKNOWN,
        )

    def _ticks(self, pid: int) -> int | None:
        """Return the CPU time of a worker; None where it has ended, and its number may be another process's."""
        text = read_text(f"/proc/{pid}/stat")
        fields = text[text.rindex(")") + 2 :].split(None, _SYSTEM_TICKS + 1) if text else ()
        if not fields or fields[0] == "Z" or int(fields[_PARENT]) != self._parent:
            return None

        return int(fields[_USER_TICKS]) + int(fields[_SYSTEM_TICKS])

    def _read_memory(self, t_ns: int, pids: list[int]) -> None:
        began = time.thread_time_ns()
        self._turn = (self._turn + 1) % len(pids)
        pid = pids[self._turn]
        found = _memory(pid)
        if found is not None:
            self._known[pid], self._read = found, pid

        self._reads += 1
        cost_ns = time.thread_time_ns() - began
        self._memory.spent(t_ns, cost_ns // _EAGER if self._reads <= EAGER_READS else cost_ns)


def _waited_ns(pid: int) -> int:
    """Return the time that the main thread of a process waited for a core; 0 where it is not known."""
    fields = (read_text(f"/proc/{pid}/schedstat") or "").split()
    return int(fields[1]) if len(fields) > 1 else 0


def _cores(pids: Iterable[int]) -> set[int]:
    found: set[int] = set()
    for pid in pids:
        try:
            found |= os.sched_getaffinity(pid)
        except OSError:  # it has just ended
            continue

    return found


def _memory(pid: int) -> _WorkerMemory | None:
    """Return the private and the anonymous memory of a process; None where it has ended."""
    fields = [line.split() for line in (read_text(f"/proc/{pid}/smaps_rollup") or "").splitlines()]
    sizes = {line[0]: int(line[1]) * 1024 for line in fields if len(line) == 3 and line[2] == "kB"}
    if "Private_Dirty:" not in sizes:
        return None

    return _WorkerMemory(sizes["Private_Dirty:"] + sizes.get("Private_Clean:", 0), sizes.get("Anonymous:", 0))
