"""The process that another one waits for, of real processes."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.eventually import eventually
from traceml.inspection.blocking_process import blocking_process
from traceml.inspection.kernel_state import children_of
from traceml.inspection.program_names import program_name

pytestmark = pytest.mark.process

LOCK = "import fcntl, sys\nfcntl.flock(open(sys.argv[1], 'w'), fcntl.LOCK_EX)"
WAIT = "import os, subprocess\nchild = subprocess.Popen(['sleep', '60'])\nprint(child.pid, flush=True)\nchild.wait()"
ANY_CHILD = "import os, subprocess\nsubprocess.Popen(['sleep', '60'])\nprint(flush=True)\nos.wait()"


def test_the_holder_of_a_locked_file_is_found(tmp_path: Path) -> None:
    """By the kernel's list of locks."""
    path = tmp_path / "build.lock"
    with path.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with subprocess.Popen([sys.executable, "-c", LOCK, str(path)]) as process:
            try:
                eventually(lambda: blocking_process(process.pid, process.pid) == os.getpid())
            finally:
                process.kill()


def test_the_child_that_is_waited_for_is_found() -> None:
    """By the argument of the system call."""
    with subprocess.Popen([sys.executable, "-c", WAIT], stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            child = int(process.stdout.readline())
            eventually(lambda: blocking_process(process.pid, process.pid) == child)
        finally:
            os.killpg(process.pid, 9)


SHELL = """
import subprocess, sys
child = subprocess.Popen(sys.argv[1], shell=True)
print(child.pid, flush=True)
child.wait()
"""


@contextmanager
def waiting_for_shell(command: str) -> Iterator[tuple[int, int]]:
    """A process that waits for a command, and the number of its shell."""
    with subprocess.Popen(
        [sys.executable, "-c", SHELL, command], stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            yield process.pid, int(process.stdout.readline())
        finally:
            os.killpg(process.pid, 9)


@pytest.mark.parametrize(
    "command",
    [
        "sleep 61 | cat",
        "cat /dev/zero | sleep 61",
        "true && (sleep 61; true)",
        "sh -c 'sleep 61; true'; true",
    ],
)
def test_the_program_behind_a_shell_is_found(command: str) -> None:
    """In a pipeline the one that does not wait for its pipe; also behind a shell in a shell."""
    with waiting_for_shell(command) as (waiting, _):
        eventually(lambda: program_name(blocking_process(waiting, waiting) or 0) == "sleep", f"sleep behind {command}")


def test_a_shell_that_runs_several_programs_is_named_itself() -> None:
    """Which of them it waits for is not known."""
    with waiting_for_shell("sleep 61 & sleep 62; true") as (waiting, shell):
        eventually(lambda: [program_name(each) for each in children_of(shell)] == ["sleep", "sleep"])
        eventually(lambda: blocking_process(waiting, waiting) == shell)


def test_a_wait_for_any_child_names_none() -> None:
    """It may be another one that ends first."""
    with subprocess.Popen([sys.executable, "-c", ANY_CHILD], stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            eventually(lambda: "wait" in Path(f"/proc/{process.pid}/wchan").read_text())
            assert blocking_process(process.pid, process.pid) is None
        finally:
            os.killpg(process.pid, 9)


@pytest.mark.parametrize(
    ("lines", "holder"),
    [
        (("3: FLOCK  ADVISORY  WRITE 4711 08:01:12 0 EOF", "3: -> FLOCK  ADVISORY  WRITE 99 08:01:12 0 EOF"), 4711),
        (("3: OFDLCK ADVISORY  WRITE -1 08:01:12 0 EOF", "3: -> POSIX  ADVISORY  WRITE 99 08:01:12 0 EOF"), None),
        (("3: FLOCK  ADVISORY  WRITE 0 08:01:12 0 EOF", "3: -> FLOCK  ADVISORY  WRITE 99 08:01:12 0 EOF"), None),
        (("3: FLOCK  ADVISORY  WRITE 4711 08:01:12 0 EOF", "3: -> FLOCK  ADVISORY  WRITE 98 08:01:12 0 EOF"), None),
        (("3:", "broken"), None),
    ],
)
def test_lines_of_locks(tmp_path: Path, lines: tuple[str, ...], holder: int | None) -> None:
    """A holder in another namespace of processes has the number 0; a lock of an open file has none."""
    locks = tmp_path / "locks"
    locks.write_text("\n".join(lines))

    assert blocking_process(99, os.getpid(), locks) == holder


def test_without_a_list_of_locks_there_is_no_holder(tmp_path: Path) -> None:
    """It cannot be read everywhere."""
    assert blocking_process(99, os.getpid(), tmp_path / "missing") is None
