"""Samples of resources that have a limit: open files, CPU time, shared memory, disk, processes, memory, CPU quota.

Also what a child of this process may have died of: memory and shared memory that ran out.
"""

from __future__ import annotations

import _thread
import math
import os
import resource
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from traceml.clock import own_time as time
from traceml.database.schema import LIMITS, Resource, Table
from traceml.inspection.cgroups import OomWatch
from traceml.inspection.kernel_state import read_text
from traceml.samplers import cgroup
from traceml.samplers.base import Sampler, SampleRow

__all__ = ["DeathCauses", "HostLimitsSampler", "LimitsSampler"]

_Usage = tuple[int, int] | None
# A row is kept when the use has changed by this share of the limit, or is this old.
_CHANGE = 0.01
_OLD_NS = 60 * 10**9
_PATIENCE_S = 0.1  # a file system is read in microseconds


class LimitsSampler(Sampler):
    """Samples the limits of this process: open files, CPU time.

    A row is returned when the use has changed by a hundredth of the limit, and once a minute.
    """

    name: ClassVar[str] = "limits"
    table: ClassVar[Table] = LIMITS

    def __init__(self) -> None:
        self._kept: dict[Resource, tuple[int, int]] = {}

    def sample(self, t_ns: int, step: int) -> Iterator[SampleRow]:
        """Yield a row for each resource that has a limit and has changed."""
        for kind, read in self._resources():
            usage = read()
            if usage is not None and usage[1] > 0 and self._is_new(kind, t_ns, *usage):
                yield t_ns, step, int(kind), *usage

    def _resources(self) -> tuple[tuple[Resource, Callable[[], _Usage]], ...]:
        return (Resource.OPEN_FILES, open_files), (Resource.CPU_TIME, cpu_time)

    def _is_new(self, kind: Resource, t_ns: int, used: int, limit: int) -> bool:
        before = self._kept.get(kind)
        if before is not None and t_ns - before[0] < _OLD_NS and abs(used - before[1]) < _CHANGE * limit:
            return False

        self._kept[kind] = (t_ns, used)
        return True


class HostLimitsSampler(LimitsSampler):
    """Samples the limits that all processes of a host or container share; local rank 0 takes them.

    Args:
        save_folder: returns the folder of the checkpoints, None while it is not known.
    """

    name: ClassVar[str] = "host_limits"

    def __init__(self, save_folder: Callable[[], str | None] = lambda: None) -> None:
        super().__init__()
        self._save_folder = save_folder
        self._disks = _Disks()
        self._group = cgroup.limited_memory()
        self._processes = cgroup.limited_processes()
        self._cpu = cgroup.throttling()
        self._first = self._throttled()

    def close(self) -> None:
        """Close the open files."""
        if self._group is not None:
            self._group.close()

    def _resources(self) -> tuple[tuple[Resource, Callable[[], _Usage]], ...]:
        working, checkpoints = self._disks.read(self._save_folder())
        return (
            (Resource.SHARED_MEMORY, lambda: file_system("/dev/shm")),  # noqa: S108 - it is only measured
            (Resource.DISK, lambda: working),
            (Resource.PROCESSES, self._process_count),
            (Resource.MEMORY, self._memory),
            (Resource.CPU_QUOTA, self._throttled_since_start),
            (Resource.CHECKPOINT_DISK, lambda: checkpoints),
        )

    def _process_count(self) -> _Usage:
        if self._processes is None:
            return None

        path, limit = self._processes
        return int(read_text(path) or 0), limit

    def _memory(self) -> _Usage:
        return None if self._group is None else (self._group.used_bytes(), self._group.limit_bytes)

    def _throttled(self) -> _Usage:
        text = read_text(self._cpu) if self._cpu else ""
        fields = dict(line.split(None, 1) for line in text.splitlines() if " " in line)
        if "nr_periods" not in fields:
            return None

        return int(fields.get("nr_throttled", 0)), int(fields["nr_periods"])

    def _throttled_since_start(self) -> _Usage:
        now = self._throttled()
        return None if now is None or self._first is None else (now[0] - self._first[0], now[1] - self._first[1])


class _Disks:
    """The file systems of the working directory and of the checkpoints.

    They are read on a thread that may be lost: a network file system whose server is gone never answers, and the
    recorder's thread has to report the hang that comes of it.
    """

    def __init__(self) -> None:
        self._is_reading = False
        self._found: list[tuple[_Usage, _Usage]] = []
        self._save_device: int | None = None

    def read(self, save_folder: str | None) -> tuple[_Usage, _Usage]:
        """Return the use of the working directory's file system, and of the checkpoints' if it is another one."""
        if self._is_reading:
            return None, None

        late, self._found = self._found, []
        done = _thread.allocate_lock()
        done.acquire()
        self._is_reading = True
        try:  # Thread.start() would wait for the GIL of the new thread, however long another one holds it
            _thread.start_new_thread(self._read_into, (self._found, save_folder, done))
        except RuntimeError:  # no thread may be started: the interpreter ends, or a limit is reached
            self._is_reading = False
            return None, None

        done.acquire(timeout=_PATIENCE_S)
        return (self._found or late or [(None, None)])[0]

    def _read_into(self, found: list[tuple[_Usage, _Usage]], save_folder: str | None, done: _thread.LockType) -> None:
        try:
            found.append((file_system("."), None if save_folder is None else self._checkpoint_disk(save_folder)))
        finally:
            self._is_reading = False
            done.release()

    def _checkpoint_disk(self, folder: str) -> _Usage:
        device = device_of(folder)
        if device in (None, device_of(".")):
            return None

        # The use of another file system later is not growth of this one.
        self._save_device = device if self._save_device is None else self._save_device
        return file_system(folder) if device == self._save_device else None


def open_files() -> _Usage:
    """Return (open descriptors of this process, its soft limit); None without a limit."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return None

    # The size of the folder, since Linux 6.2: a list of thousands of files takes milliseconds.
    used = os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd")) - 1  # noqa: PTH116, PTH208
    return used, limit


def cpu_time() -> _Usage:
    """Return (seconds of CPU time of this process, its limit); None without a limit."""
    limit = resource.getrlimit(resource.RLIMIT_CPU)[0]
    return None if limit == resource.RLIM_INFINITY else (math.ceil(time.process_time()), limit)


def device_of(path: str) -> int | None:
    """Return the number of a path's file system; None if the path does not exist."""
    try:
        return os.stat(path).st_dev  # noqa: PTH116 - without importing pathlib's machinery per sample
    except OSError:
        return None


def file_system(path: str) -> _Usage:
    """Return (bytes in use, bytes that a user may use) of the file system of a path; None if it cannot be read."""
    try:
        found = os.statvfs(path)
    except OSError:
        return None

    used = (found.f_blocks - found.f_bfree) * found.f_frsize
    return used, used + found.f_bavail * found.f_frsize


class DeathCauses:
    """Tells what may have killed a child of this process.

    Args:
        watch: counts the kills of the kernel's out-of-memory killer.
    """

    def __init__(self, watch: OomWatch | None = None) -> None:
        self._watch = watch or OomWatch()

    def facts(self) -> dict[str, Any]:
        """Return what is known: `oom_kills` since the start, memory, and shared memory with its use."""
        shared = file_system("/dev/shm")  # noqa: S108 - it is only measured
        known = {
            "oom_kills": self._watch.kills(),
            "shm_bytes": shared[1] if shared else None,
            "shm_used_bytes": shared[0] if shared else None,
            "memory_limit_bytes": _memory_limit(),
        }
        return {key: value for key, value in known.items() if value is not None}


def _memory_limit() -> int | None:
    group = cgroup.limited_memory()
    if group is None:
        return None

    group.close()
    return group.limit_bytes
