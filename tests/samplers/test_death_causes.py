"""What may have killed a process: the kernel's counter and the limits."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from traceml.samplers import cgroup
from traceml.samplers.death_causes import DeathCauses


def test_kills_are_counted_from_the_start(tmp_path: Path) -> None:
    """Earlier ones are another run's; limits are those of this process."""
    counter = tmp_path / "memory.events"
    counter.write_text("low 0\nmax 9\noom 4\noom_kill 4\n")
    causes = DeathCauses(str(counter))
    before = causes.facts()
    counter.write_text("low 0\nmax 9\noom 6\noom_kill 6\n")

    shared = os.statvfs("/dev/shm")
    assert before["oom_kills"] == 0
    assert causes.facts()["oom_kills"] == 2
    assert causes.facts()["files_limit"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert 0 < causes.facts()["shm_bytes"] <= shared.f_blocks * shared.f_frsize


def test_a_kernel_without_the_counter_says_nothing(tmp_path: Path) -> None:
    """No kills is a statement, which is not made then."""
    assert "oom_kills" not in DeathCauses(str(tmp_path / "missing")).facts()


def test_the_counter_is_that_of_the_innermost_group(tmp_path: Path) -> None:
    """Version 2, version 1, and the machine's."""
    for folder, name in (("pods/mine", "memory.events"), ("memory/old", "memory.oom_control")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / name).write_text("oom_kill_disable 0\noom_kill 1\n")

    assert cgroup.memory_events(str(tmp_path), "0::/pods/mine") == f"{tmp_path}/pods/mine/memory.events"
    assert cgroup.memory_events(str(tmp_path), "9:memory:/old") == f"{tmp_path}/memory/old/memory.oom_control"
    assert cgroup.memory_events(str(tmp_path), "0::/other") == "/proc/vmstat"
