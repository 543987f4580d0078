"""Processes that use the cores of this host, by name; those of other users have none here."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

from traceml.inspection.kernel_state import ProcessInfo, process_info
from traceml.inspection.program_names import program_name

__all__ = ["MIN_CORES", "BusyProcesses"]

MIN_CORES = 0.1
"""Processes of one name are reported if they use this many cores or more."""


class BusyProcesses:
    """Reads /proc now and then; a reading takes about 30 us per process of the host.

    Args:
        user: number of the user whose processes have names; by default the one who runs this.
    """

    def __init__(self, user: int | None = None) -> None:
        self._user = os.getuid() if user is None else user
        self._cpu_s: dict[int, float] | None = None
        self._read_s = 0.0

    def read(self, own: Collection[int]) -> dict[str, float]:
        """Return the cores that processes have used since the reading before, by name, the most first.

        Empty at the first reading. The name of processes of other users is empty.

        Args:
            own: processes that are left out with all their descendants, and with those that the same parent has
                started from the same program: ranks that have not connected yet, or have ended their tracing.
        """
        now_s, known = time.monotonic(), _processes()
        passed_s, self._read_s = now_s - self._read_s, now_s
        before, self._cpu_s = self._cpu_s, {pid: info.cpu_s for pid, info in known.items()}
        if before is None or passed_s <= 0:
            return {}

        own = {*own, *self._siblings(own, known)}
        used: Counter[str] = Counter()
        for pid, info in known.items():
            cores = (info.cpu_s - before.get(pid, info.cpu_s)) / passed_s
            if cores > 0 and not _is_below(pid, own, known):
                used[_name(pid, self._user)] += cores  # type: ignore[assignment]

        return {name: round(cores, 2) for name, cores in used.most_common() if cores >= MIN_CORES}

    def _siblings(self, own: Collection[int], known: Mapping[int, ProcessInfo]) -> set[int]:
        parents = {known[pid].parent for pid in own if pid in known}
        children = {pid: info.parent for pid, info in known.items() if info.parent in parents}
        programs = {pid: (parent, _name(pid, self._user)) for pid, parent in children.items()}
        of_own = {programs[pid] for pid in own if pid in programs}
        return {pid for pid, program in programs.items() if program in of_own}


def _processes() -> dict[int, ProcessInfo]:
    found = (process_info(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal())
    return {info.pid: info for info in found if info is not None}


def _is_below(pid: int, own: Collection[int], known: Mapping[int, ProcessInfo]) -> bool:
    """Whether a process is one of `own` or descends from one."""
    for _ in range(len(known)):
        if pid in own:
            return True

        info = known.get(pid)
        if info is None:
            return False

        pid = info.parent

    return False


def _name(pid: int, user: int) -> str:
    """Return the name of a process of a user; empty for another user's."""
    try:
        return program_name(pid) if Path(f"/proc/{pid}").stat().st_uid == user else ""
    except OSError:  # it has just ended
        return ""
