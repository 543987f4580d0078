"""A worker of the tests that crashes tells how, where the failure is read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_TEST = """
import ctypes, faulthandler, os, signal

def test_before():
    faulthandler.disable()

def test_crash():
    {crash}
"""


@pytest.mark.process
@pytest.mark.parametrize(
    ("crash", "end", "frame"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by signal 9 (SIGKILL)", ""),
        ("os._exit(7)", "ended with exit code 7", ""),
        ("ctypes.string_at(0)", "was killed by signal 11 (SIGSEGV)", "test_one.py"),
    ],
)
def test_the_failure_has_the_end_of_the_process_and_its_stacks(
    tmp_path: Path, crash: str, end: str, frame: str
) -> None:
    """Also where the test before has turned faulthandler off."""
    test = tmp_path / "test_one.py"
    test.write_text(_TEST.format(crash=crash))
    command = [sys.executable, "-m", "pytest", "-n", "1", "-p", "tests.crashed_workers", "-p", "no:cacheprovider"]
    ended = subprocess.run(
        [*command, "--rootdir", tmp_path, test], capture_output=True, text=True, check=False, timeout=240
    )
    failure = ended.stdout.partition("FAILURES")[2].partition("short test summary")[0]

    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert f"its process {end}\n" in failure
    assert ("in test_crash" in failure) is bool(frame)
    assert frame in failure
