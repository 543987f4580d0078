"""Limits of this process, its host, and of fake cgroups."""

from __future__ import annotations

import _thread
import os
import resource
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.eventually import eventually
from traceml.database.schema import Resource
from traceml.samplers import cgroup, limits
from traceml.samplers.limits import HostLimitsSampler, LimitsSampler, open_files

SECOND = 10**9


def test_open_files_are_told_when_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row at first, none while nothing changes, one after a hundredth of the limit, one a minute."""
    used = iter((30, 39, 40, 40, 40))
    monkeypatch.setattr(limits, "open_files", lambda: (next(used), 1000))
    sampler = LimitsSampler()

    rows = [list(sampler.sample(t_s * SECOND, 3)) for t_s in (1, 2, 3, 62, 63)]

    told = [(t_s * SECOND, 3, Resource.OPEN_FILES, count, 1000) for t_s, count in ((1, 30), (3, 40), (63, 40))]
    assert rows == [told[:1], [], told[1:2], [], told[2:]]


@pytest.mark.parametrize("size", [None, 0])
def test_open_files_are_counted(monkeypatch: pytest.MonkeyPatch, size: int | None) -> None:
    """Before Linux 6.2 the folder has no size, and its entries are counted."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if size is not None:
        monkeypatch.setattr(os, "stat", lambda _path: SimpleNamespace(st_size=size))

    # While no thread of another test opens or closes one, and none is collected.
    eventually(lambda: open_files() == (len([*Path("/proc/self/fd").iterdir()]) - 1, limit))


def test_cpu_time_is_sampled_where_it_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """In whole seconds, of the soft limit."""
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (600, -1) if kind == resource.RLIMIT_CPU else (-1, -1))

    (row,) = LimitsSampler().sample(SECOND, 3)

    assert row == (SECOND, 3, Resource.CPU_TIME, pytest.approx(time.process_time(), abs=1.5), 600)


def test_a_file_system_that_never_answers_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its server is gone: the other resources are still sampled, and it is not asked again before it answers."""
    answers, asked = threading.Event(), []

    def read(path: str) -> tuple[int, int]:
        if path == ".":
            asked.append(path)
            answers.wait(30)

        return 1, 2

    monkeypatch.setattr(limits, "file_system", read)
    sampler = HostLimitsSampler()
    first, second = ({row[2] for row in sampler.sample(t_ns, 0)} for t_ns in (0, 10**11))
    answers.set()
    eventually(lambda: not sampler._disks._is_reading)

    assert int(Resource.SHARED_MEMORY) in first & second
    assert int(Resource.DISK) not in first | second
    assert asked == ["."]
    assert int(Resource.DISK) in {row[2] for row in sampler.sample(2 * 10**11, 0)}
    sampler.close()


def test_without_a_thread_the_other_resources_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """None can be started where processes reach their limit, and while Python 3.12 ends."""

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    sampler = HostLimitsSampler()

    assert int(Resource.SHARED_MEMORY) in {row[2] for row in sampler.sample(1, 0)}
    sampler.close()


def test_file_systems_are_those_of_the_host() -> None:
    """Shared memory and the working directory's disk, in bytes."""
    sampler = HostLimitsSampler()
    rows = {row[2]: row for row in sampler.sample(1, 0)}
    sampler.close()
    disk = shutil.disk_usage(".")

    assert abs(rows[Resource.DISK][3] - disk.used) < 1 << 30
    assert abs(rows[Resource.DISK][4] - (disk.used + disk.free)) < 1 << 30
    assert rows[Resource.SHARED_MEMORY][4] > 0


def test_the_disk_of_checkpoints_is_another_one(tmp_path: Path) -> None:
    """It is sampled once a folder is known, where it is not the disk of the working directory."""
    folders: list[str | None] = [None, ".", "/dev/shm/checkpoint-1/gone", "/dev/shm"]
    sampler = HostLimitsSampler(lambda: folders.pop(0))
    found = [[row for row in sampler.sample(1, 0) if row[2] == Resource.CHECKPOINT_DISK] for _ in range(4)]
    sampler.close()

    assert found[:3] == [[], [], []]
    assert found[3][0][4] <= shutil.disk_usage("/dev/shm").total


def test_limits_of_the_innermost_control_group(tmp_path: Path) -> None:
    """`max` is no limit; the group above has one."""
    job = tmp_path / "pod" / "job"
    job.mkdir(parents=True)
    (job / "pids.max").write_text("max\n")
    (job / "pids.current").write_text("12\n")
    (job.parent / "pids.max").write_text("100\n")
    (job.parent / "pids.current").write_text("40\n")
    (job / "cpu.stat").write_text("usage_usec 5\n")
    (job.parent / "cpu.stat").write_text("usage_usec 5\nnr_periods 10\nnr_throttled 4\n")

    assert cgroup.limited_processes(str(tmp_path), "0::/pod/job\n") == (str(job.parent / "pids.current"), 100)
    assert cgroup.throttling(str(tmp_path), "0::/pod/job\n") == str(job.parent / "cpu.stat")
    assert cgroup.limited_processes(str(tmp_path), "0::/other\n") is None
