"""Workers that are forked run tests as others do, and tell how they have ended."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_CONFTEST = """
from tests.forked.workers import fork_workers

def pytest_xdist_setupnodes(config, specs):
    fork_workers(config, len(specs))
"""
_TEST = """
import os, signal, threading, psutil, pytest
IMPORTED_BY = os.getpid()

@pytest.mark.parametrize("number", range(6))
def test_forked(number):
    assert IMPORTED_BY == os.getppid(), "imported again"
    assert "server.py" in psutil.Process(IMPORTED_BY).cmdline()[1]
    assert threading.main_thread().native_id == os.getpid()

def test_a_failed_comparison():
    left = [1, 2]
    assert left == [1, 3]

def test_crash():
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_share_the_import_of_the_tests(tmp_path: Path) -> None:
    """A worker imports no test itself; its assertions are explained, and its end is known."""
    (tmp_path / "conftest.py").write_text(_CONFTEST)
    (tmp_path / "test_one.py").write_text(_TEST)
    command = [sys.executable, "-m", "pytest", "-n", "3", "-p", "tests.crashed_workers", "-p", "no:cacheprovider"]
    ended = subprocess.run(
        [*command, "--rootdir", tmp_path, tmp_path], capture_output=True, text=True, check=False, timeout=240
    )

    assert "2 failed, 6 passed" in ended.stdout, ended.stdout + ended.stderr
    assert "At index 1 diff: 2 != 3" in ended.stdout
    assert "its process was killed by signal 9 (SIGKILL)" in ended.stdout
