"""Snapshots of the process that another one waits for, of real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.eventually import eventually
from traceml.database.snapshots.blocker_snapshot import blocker_of

pytestmark = pytest.mark.process

TWICE = """
import fcntl, sys
first, second = (open(sys.argv[1], "w") for _ in range(2))
fcntl.flock(first, fcntl.LOCK_EX)
fcntl.flock(second, fcntl.LOCK_EX)
"""


def test_a_process_that_waits_for_its_own_lock_is_told_so(tmp_path: Path) -> None:
    """Two open files of one path do not share a lock, also in one process."""
    with subprocess.Popen([sys.executable, "-c", TWICE, str(tmp_path / "lock")]) as process:
        try:
            seen = eventually(lambda: blocker_of(process.pid, process.pid))
            assert seen is not None
            assert (seen.pid, seen.is_self) == (process.pid, True)
        finally:
            process.kill()
