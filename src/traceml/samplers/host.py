"""Host samples: CPU, memory, disks, network; local rank 0 takes them for all ranks of the host."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from traceml.database.schema import HOST, Table
from traceml.samplers import cgroup
from traceml.samplers.base import Sampler, SampleRow
from traceml.samplers.procfs import ProcFile, open_if_visible

__all__ = ["HostSampler"]

_SECTOR_BYTES = 512  # the unit of /proc/diskstats, for every disk


class HostSampler(Sampler):
    """Samples the machine, or the memory of the container if it is limited.

    Raises:
        OSError: there is no /proc.
    """

    name: ClassVar[str] = "host"
    table: ClassVar[Table] = HOST

    def __init__(self) -> None:
        self._cores = cgroup.cores()
        self._group = cgroup.limited_memory()
        self._stat = ProcFile("/proc/stat", 1024)
        self._meminfo = ProcFile("/proc/meminfo", 1024)
        self._disks = open_if_visible("/proc/diskstats", 65536)
        self._net = open_if_visible("/proc/net/dev", 65536)
        self._disk_names = _disk_names()
        self._busy, self._total = self._cpu_ticks()
        self._cpu_pct = 0.0

    def sample(self, t_ns: int, step: int) -> tuple[SampleRow]:  # noqa: ARG002 - the protocol's signature
        """Return one row."""
        used, total = self._memory()
        return ((t_ns, self._cores, self._cpu_share(), used, total, *self._disk_bytes(), *self._net_bytes()),)

    def close(self) -> None:
        """Close the open files."""
        for file in (self._stat, self._meminfo, self._disks, self._net, self._group):
            if file is not None:
                file.close()

    def _cpu_ticks(self) -> tuple[int, int]:
        user, nice, system, idle, iowait, irq, softirq, steal = map(int, self._stat.read().split(None, 9)[1:9])
        busy = user + nice + system + irq + softirq + steal
        return busy, busy + idle + iowait

    def _cpu_share(self) -> float:
        busy, total = self._cpu_ticks()
        if total > self._total:  # two samples within one tick have no difference
            self._cpu_pct = 100.0 * (busy - self._busy) / (total - self._total)
            self._busy, self._total = busy, total

        return min(max(self._cpu_pct, 0.0), 100.0)

    def _memory(self) -> tuple[int, int]:
        fields = self._meminfo.read().split()
        total = int(fields[1]) * 1024
        available = int(fields[fields.index(b"MemAvailable:") + 1]) * 1024
        if self._group is not None and self._group.limit_bytes < total:
            return self._group.used_bytes(), self._group.limit_bytes

        return total - available, total

    def _disk_bytes(self) -> tuple[int, int]:
        read = written = 0
        for line in self._disks.read().splitlines() if self._disks is not None else ():
            fields = line.split(None, 10)
            if len(fields) > 9 and fields[2] in self._disk_names:
                read += int(fields[5])
                written += int(fields[9])

        return read * _SECTOR_BYTES, written * _SECTOR_BYTES

    def _net_bytes(self) -> tuple[int, int]:
        received = sent = 0
        for line in self._net.read().splitlines()[2:] if self._net is not None else ():
            name, _, figures = line.partition(b":")
            fields = figures.split(None, 9)
            if name.strip() != b"lo" and len(fields) > 8:
                received += int(fields[0])
                sent += int(fields[8])

        return received, sent


def _disk_names() -> frozenset[bytes]:
    """Return the names of physical disks: partitions and mappings would count the same bytes twice."""
    try:
        names = [path.name for path in Path("/sys/block").iterdir()]
    except OSError:
        return frozenset()

    virtual = ("loop", "ram", "zram", "dm-", "md")
    return frozenset(name.encode() for name in names if not name.startswith(virtual))
