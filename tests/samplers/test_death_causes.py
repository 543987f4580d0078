"""What may have killed a process: the kernel's counter and the limits."""

from __future__ import annotations

import os
from pathlib import Path

from traceml.inspection.cgroups import OomWatch
from traceml.samplers.limits import DeathCauses


def test_kills_are_counted_from_the_start(tmp_path: Path) -> None:
    """Earlier ones are another run's; limits are those of this process."""
    counter = tmp_path / "memory.events"
    counter.write_text("low 0\nmax 9\noom 4\noom_kill 4\n")
    causes = DeathCauses(OomWatch(groups={}, host=counter))
    before = causes.facts()
    counter.write_text("low 0\nmax 9\noom 6\noom_kill 6\n")

    shared = os.statvfs("/dev/shm")
    assert before["oom_kills"] == 0
    assert causes.facts()["oom_kills"] == 2
    assert 0 < causes.facts()["shm_bytes"] <= shared.f_blocks * shared.f_frsize
    assert 0 <= causes.facts()["shm_used_bytes"] <= causes.facts()["shm_bytes"]


def test_a_kernel_without_the_counter_says_nothing(tmp_path: Path) -> None:
    """No kills is a statement, which is not made then."""
    assert "oom_kills" not in DeathCauses(OomWatch(groups={}, host=tmp_path / "missing")).facts()
