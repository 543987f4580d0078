"""Samples of the loaders' worker processes: CPU time, waiting for a core, cores they may use, private memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import ClassVar, NamedTuple

from traceml.clock import own_time as time
from traceml.database.schema import LOADER_WORKERS, Table
from traceml.inspection.kernel_state import core_wait_ns, process_info, read_text
from traceml.samplers.base import Sampler, SampleRow

__all__ = ["EAGER", "EARLY_PARTS", "MEMORY_SHARE", "Groups", "LoaderWorkersSampler"]

Groups = Callable[[], Iterable[tuple[int, tuple[int, ...]]]]

STATE_SHARE = 0.001
"""Share of a core that reading the state of the workers may take."""
MEMORY_SHARE = 0.002
"""Share of a core that reading their private memory may take: the kernel walks all pages of a process, some 10 ms."""
EAGER, EARLY_PARTS = 10, 8
"""The first readings of memory may take so many times that share, if they are an eighth of the time so far apart.

Then a run of any length has nine of them or more in its last three quarters, which suffice to judge.
"""
FAST_BYTES = 16 << 20
"""New memory of workers since their last readings that is worth a value of its own."""
_UNKNOWN = -1
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class _WorkerMemory(NamedTuple):
    """Memory of a worker by the last reading, which walks its pages, and its resident memory by a counter then."""

    private_bytes: int
    anonymous_bytes: int
    resident_bytes: int


class _Budget:
    """Tells when something may run again, so that it takes a share of a core."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._due_ns = 0

    def allows(self, t_ns: int) -> bool:
        """Return whether it may run now."""
        return t_ns >= self._due_ns

    def spent(self, t_ns: int, cost_ns: int, sooner_ns: float | None = None) -> None:
        """Record a run and its CPU time.

        Args:
            sooner_ns: time after which it may run again, if that is up to `EAGER` times sooner.
        """
        apart_ns = cost_ns / self._share
        apart_ns = apart_ns if sooner_ns is None else min(apart_ns, max(sooner_ns, apart_ns / EAGER))
        self._due_ns = t_ns + int(apart_ns)


class LoaderWorkersSampler(Sampler):
    """Samples the workers of each iterator, within a budget: the memory of one process at a time, in turns.

    A reading walks all pages: 1 GiB takes 40 ms, so that there is one each 20 s. Between them the kernel's counter
    of resident pages shows what grows fast.

    Args:
        groups: returns (number of the loader, ids of its worker processes) of each iterator.
    """

    name: ClassVar[str] = "loader_workers"
    table: ClassVar[Table] = LOADER_WORKERS

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._state, self._memory = _Budget(STATE_SHARE), _Budget(MEMORY_SHARE)
        self._parent = os.getpid()
        self._known: dict[int, _WorkerMemory] = {}
        self._parents: dict[int, int] = {}  # of each worker
        self._turn = 0
        self._first_ns: int | None = None
        self._read: int | None = None  # worker whose memory was read since the last rows

    def sample(self, t_ns: int, step: int) -> Iterator[SampleRow]:
        """Yield one row per iterator that has workers."""
        groups = self._groups()
        if not groups or not self._state.allows(t_ns):
            return

        began = time.thread_time_ns()
        pids = [pid for _, own in groups for pid in own]
        self._known = {pid: memory for pid, memory in self._known.items() if pid in pids}
        self._parents = {pid: self._parents.get(pid) or self._parent_of(pid) for pid in pids}
        rows = [row for loader, own in groups if (row := self._row(t_ns, step, loader, own)) is not None]
        self._read = None
        self._state.spent(t_ns, time.thread_time_ns() - began)
        yield from rows
        if self._memory.allows(t_ns):
            self._read_memory(t_ns, pids)

    def _row(self, t_ns: int, step: int, loader: int, pids: tuple[int, ...]) -> SampleRow | None:
        alive = {pid: cpu_s for pid in pids if (cpu_s := self._cpu_s(pid)) is not None}
        if not alive:
            return None

        private, anonymous = self._memory_of(alive) if self._known.keys() >= alive.keys() else (_UNKNOWN, _UNKNOWN)
        return (
            t_ns,
            step,
            loader,
            pids[0],
            len(alive),
            round(sum(alive.values()) * 1e9),
            sum(core_wait_ns(str(pid)) for pid in alive),
            len(_cores(alive)),
            private,
            anonymous,
        )

    def _memory_of(self, pids: Collection[int]) -> tuple[int, int]:
        """Return the private and anonymous memory of workers; unknown where none was newly read, or has grown fast.

        What a worker has allocated since its last reading is private memory. Copies of pages that it shares are not
        seen before the next one.
        """
        known = [self._known[pid] for pid in pids]
        new_bytes = sum(_resident_bytes(pid) - self._known[pid].resident_bytes for pid in pids)
        if (self._read is None or self._read not in pids) and new_bytes < FAST_BYTES:
            return _UNKNOWN, _UNKNOWN

        private, anonymous = (sum(each[place] for each in known) + new_bytes for place in (0, 1))
        return max(private, 0), max(anonymous, 0)

    def _cpu_s(self, pid: int) -> float | None:
        """Return the CPU time of a worker; None if it has ended, and its number may be another process's."""
        info = process_info(pid)
        if info is None or info.state == "Z" or info.parent != self._parents[pid]:
            return None

        return info.cpu_s

    def _parent_of(self, pid: int) -> int:
        """Return the process that a worker must be a child of: this one, or the fork server that this one started."""
        info = process_info(pid)
        server = None if info is None or info.parent == self._parent else process_info(info.parent)
        return server.pid if server is not None and server.parent == self._parent else self._parent

    def _read_memory(self, t_ns: int, pids: list[int]) -> None:
        began = time.thread_time_ns()
        self._turn = (self._turn + 1) % len(pids)
        pid = pids[self._turn]
        found = _memory(pid)
        if found is not None:
            self._known[pid], self._read = found, pid

        self._first_ns = t_ns if self._first_ns is None else self._first_ns
        self._memory.spent(t_ns, time.thread_time_ns() - began, (t_ns - self._first_ns) / EARLY_PARTS)


def _cores(pids: Iterable[int]) -> set[int]:
    found: set[int] = set()
    for pid in pids:
        try:
            found |= os.sched_getaffinity(pid)
        except OSError:  # it has just ended
            continue

    return found


def _resident_bytes(pid: int) -> int:
    """Return the resident memory of a process that is neither of a file nor shared memory; 0 if it has ended."""
    fields = read_text(f"/proc/{pid}/statm").split(None, 3)
    return (int(fields[1]) - int(fields[2])) * _PAGE_BYTES if len(fields) > 2 else 0


def _memory(pid: int) -> _WorkerMemory | None:
    """Return the private and the anonymous memory of a process; None if it has ended."""
    fields = [line.split() for line in read_text(f"/proc/{pid}/smaps_rollup").splitlines()]
    sizes = {line[0]: int(line[1]) * 1024 for line in fields if len(line) == 3 and line[2] == "kB"}
    if "Private_Dirty:" not in sizes:
        return None

    private_bytes = sizes["Private_Dirty:"] + sizes.get("Private_Clean:", 0)
    return _WorkerMemory(private_bytes, sizes.get("Anonymous:", 0), _resident_bytes(pid))
