"""Processes that use the cores of this host, by name: those that ranks have started, and all others."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from traceml.inspection.kernel_state import ProcessInfo, process_info
from traceml.inspection.program_names import program_name

__all__ = ["MIN_CORES", "SHORT_LIVED", "BusyProcesses", "CoreUse"]

MIN_CORES = 0.1
"""Processes of one name are reported if they use this many cores or more."""
SHORT_LIVED = "short-lived programs"
"""Name of what a rank has started and what has ended before it was seen."""


class CoreUse(NamedTuple):
    """Cores that processes have used, by name, the most first; those of other users have no name."""

    started: dict[str, float]  # by the ranks, their loader workers among them
    others: dict[str, float]


class BusyProcesses:
    """Reads /proc now and then; a reading takes about 30 us per process of the host.

    Args:
        user: number of the user whose processes have names; by default the one who runs this.
    """

    def __init__(self, user: int | None = None) -> None:
        self._user = os.getuid() if user is None else user
        self._before: dict[int, ProcessInfo] | None = None
        self._read_s = 0.0

    def read(self, ranks: Collection[int], apart: Collection[int] = ()) -> CoreUse | None:
        """Return the cores that processes have used since the reading before; None at the first one.

        The ranks themselves are left out, with what the same parent has started from the same program: ranks that
        have not connected yet, or have ended their tracing.

        Args:
            apart: processes that are left out with all their descendants.
        """
        now_s, known = time.monotonic(), _processes()
        passed_s, self._read_s = now_s - self._read_s, now_s
        before, self._before = self._before, known
        if before is None or passed_s <= 0:
            return None

        ranks = {*ranks, *self._siblings(ranks, known)}
        used = {True: Counter[str](), False: Counter[str]()}
        most_s = passed_s * (os.cpu_count() or 1)
        for pid, used_s in _used_s(before, known, ranks).items():
            if used_s > most_s:  # it has collected an orphan, whose CPU time of hours is not of this time
                continue

            above = _above(pid, {*ranks, *apart}, known)
            if above is None or above not in apart:
                name = SHORT_LIVED if pid in ranks else self._name(pid)
                used[above is not None][name] += used_s / passed_s  # type: ignore[assignment]

        return CoreUse(_most(used[True]), _most(used[False]))

    def _siblings(self, own: Collection[int], known: Mapping[int, ProcessInfo]) -> set[int]:
        parents = {known[pid].parent for pid in own if pid in known}
        children = {pid: info.parent for pid, info in known.items() if info.parent in parents}
        programs = {pid: (parent, self._name(pid)) for pid, parent in children.items()}
        of_own = {programs[pid] for pid in own if pid in programs}
        return {pid for pid, program in programs.items() if program in of_own}

    def _name(self, pid: int) -> str:
        """Return the name of a process of the user; empty for another user's."""
        try:
            return program_name(pid) if Path(f"/proc/{pid}").stat().st_uid == self._user else ""
        except OSError:  # it has just ended
            return ""


def _processes() -> dict[int, ProcessInfo]:
    found = (process_info(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal())
    return {info.pid: info for info in found if info is not None}


def _used_s(
    before: Mapping[int, ProcessInfo], known: Mapping[int, ProcessInfo], ranks: Collection[int]
) -> dict[int, float]:
    """Return the CPU seconds of processes, where there are any, with those of their children that have ended since.

    Of a rank only the latter: it is the training.
    """
    counted_s = Counter[int]()  # what descendants that have ended had used before
    for pid in before.keys() - known.keys():
        for above in _ancestors(pid, before):  # one of them has collected it: an orphan not the nearest that lives
            counted_s[above] += before[pid].cpu_s + before[pid].collected_s  # type: ignore[assignment]

    found = {}
    for pid, info in known.items():
        last = before.get(pid, ProcessInfo(pid, info.parent, info.state))  # it has begun since
        used_s = max(info.collected_s - last.collected_s - counted_s[pid], 0.0)
        used_s += 0.0 if pid in ranks else info.cpu_s - last.cpu_s
        if used_s > 0:
            found[pid] = used_s

    return found


def _above(pid: int, some: Collection[int], known: Mapping[int, ProcessInfo]) -> int | None:
    """Return the process itself or its nearest ancestor that is one of some; None without any."""
    return next((each for each in (pid, *_ancestors(pid, known)) if each in some), None)


def _ancestors(pid: int, known: Mapping[int, ProcessInfo]) -> Iterator[int]:
    """Yield the ancestors of a process, the nearest first, as far as they are known."""
    for _ in range(len(known)):
        info = known.get(pid)
        if info is None:
            return

        pid = info.parent
        yield pid


def _most(used: Counter[str]) -> dict[str, float]:
    return {name: round(cores, 2) for name, cores in used.most_common() if cores >= MIN_CORES}
