"""Limits of the cgroup: in a container they apply before those of the machine."""

from __future__ import annotations

import math
import os
from itertools import product

from traceml.inspection.cgroups import ROOT, cgroup_folders, cgroup_paths
from traceml.inspection.kernel_state import read_text
from traceml.samplers.procfs import ProcFile

__all__ = ["CgroupMemory", "cores", "limited_memory", "limited_processes", "throttling"]

_NO_LIMIT = 1 << 60  # cgroup v1 writes "no limit" as a number of this size
# Of versions 2 and 1: files with use and limit, and begin of the line of `memory.stat` with the reclaimable cache.
_MEMORY_FILES = (
    ("memory.current", "memory.max", "inactive_file "),
    ("memory.usage_in_bytes", "memory.limit_in_bytes", "total_inactive_file "),
)


class CgroupMemory:
    """Memory of a cgroup that has a limit."""

    def __init__(self, folder: str, usage: str, inactive: str, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._usage = ProcFile(f"{folder}/{usage}", 64)
        self._stat = ProcFile(f"{folder}/memory.stat")
        self._inactive = inactive.encode()

    def used_bytes(self) -> int:
        """Memory in use, without reclaimable file cache."""
        cache = 0
        for line in self._stat.read().splitlines():
            if line.startswith(self._inactive):
                cache = int(line.rpartition(b" ")[2])
                break

        return max(int(self._usage.read()) - cache, 0)

    def close(self) -> None:
        """Close the open files."""
        self._usage.close()
        self._stat.close()


def limited_memory(root: str = ROOT, membership: str | None = None) -> CgroupMemory | None:
    """Return the memory of the innermost group that limits this process; None without a limit.

    Args:
        membership: text of /proc/self/cgroup.
    """
    for folder, (usage, limit_name, inactive) in product(_folders("memory", root, membership), _MEMORY_FILES):
        limit = read_text(f"{folder}/{limit_name}")
        if not limit.strip().isdigit() or int(limit) >= _NO_LIMIT:
            continue

        try:
            return CgroupMemory(folder, usage, inactive, int(limit))
        except OSError:  # the limit is visible, the use is not: the caller uses the machine's figures
            continue

    return None


def cores(root: str = ROOT, membership: str | None = None) -> int:
    """Return the number of cores that this process may use, by its affinity and its CPU quota."""
    allowed = len(os.sched_getaffinity(0))
    quota = _quota(root, membership)
    return min(allowed, max(1, math.ceil(quota))) if quota is not None else allowed


def limited_processes(root: str = ROOT, membership: str | None = None) -> tuple[str, int] | None:
    """Return (file with the number of processes and threads, limit) of the innermost group that limits them."""
    for folder in _folders("pids", root, membership):
        limit = read_text(f"{folder}/pids.max")
        if limit.strip().isdigit() and read_text(f"{folder}/pids.current"):
            return f"{folder}/pids.current", int(limit)

    return None


def throttling(root: str = ROOT, membership: str | None = None) -> str | None:
    """Return the file that counts the periods in which the innermost group with a CPU quota was throttled."""
    paths = (f"{folder}/cpu.stat" for folder in _folders("cpu", root, membership))
    return next((path for path in paths if "nr_periods" in read_text(path)), None)


def _folders(controller: str, root: str, membership: str | None) -> list[str]:
    return cgroup_folders(controller, cgroup_paths(membership), root)


def _quota(root: str, membership: str | None) -> float | None:
    shares = []
    for folder in _folders("cpu", root, membership):
        text = read_text(f"{folder}/cpu.max")  # of version 2
        text = text or f"{read_text(f'{folder}/cpu.cfs_quota_us')} {read_text(f'{folder}/cpu.cfs_period_us')}"
        words = text.split()
        if len(words) == 2 and words[0].isdigit():  # without a quota it is `max` or -1
            shares.append(int(words[0]) / int(words[1]))

    return min(shares, default=None)
