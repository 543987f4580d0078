"""A crash in C leaves its Python stacks at the end of a file, unless the program uses faulthandler itself."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from traceml.inspection import thread_frames
from traceml.inspection.crash_stacks import crash_facts

_CRASH = """
import ctypes, faulthandler, os, sys
from traceml.inspection.crash_stacks import disable_crash_stacks, enable_crash_stacks

def crash():
    ctypes.string_at(0)

file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
how = sys.argv[2]
if how == "own":
    faulthandler.enable()
enable_crash_stacks(file)
if how == "forgotten":
    disable_crash_stacks()
if how == "again":
    disable_crash_stacks()
    enable_crash_stacks(file)
if how == "later":
    faulthandler.enable()
if how == "fork" and (pid := os.fork()):
    assert os.waitpid(pid, 0)[1] & 0x7F == 11
    sys.exit(0)
if how == "fork":
    disable_crash_stacks()
crash()
"""


def crash(tmp_path: Path, how: str) -> tuple[str, str]:
    """Return what stands behind the file's content, and the program's error output."""
    script, file = tmp_path / "crash.py", tmp_path / "file"
    script.write_text(_CRASH)
    file.write_bytes(b"rows")
    ended = subprocess.run(
        [sys.executable, str(script), str(file), how], capture_output=True, text=True, check=False, timeout=240
    )
    assert ended.returncode == (0 if how == "fork" else -11), ended.stderr
    assert file.read_bytes().startswith(b"rows")
    return file.read_text()[4:], ended.stderr


@pytest.mark.process
@pytest.mark.parametrize("how", ["plain", "again"])
def test_the_line_of_the_user_is_found(tmp_path: Path, how: str) -> None:
    """The innermost frame is in ctypes; the user's is the one that called it. Nothing more is printed than usual."""
    text, printed = crash(tmp_path, how)

    facts = crash_facts(text)
    assert (facts["file"], facts["line"], facts["function"]) == (str(tmp_path / "crash.py"), 6, "crash")
    assert str(facts["stack"]).rstrip().endswith("in string_at")
    assert printed == ""


@pytest.mark.process
@pytest.mark.parametrize("how", ["own", "later"])
def test_a_program_that_uses_faulthandler_keeps_its_output(tmp_path: Path, how: str) -> None:
    """Its stacks are printed where it wants them, enabled before or after."""
    text, printed = crash(tmp_path, how)

    assert text == ""
    assert "Segmentation fault" in printed


@pytest.mark.process
@pytest.mark.parametrize("how", ["forgotten", "fork"])
def test_a_closed_file_gets_nothing(tmp_path: Path, how: str) -> None:
    """After the end of the recorder, and from a forked child."""
    assert crash(tmp_path, how)[0] == ""


def test_a_crash_without_python_frames_tells_the_main_thread() -> None:
    """A thread of C++ crashed: the last thread in the text is the main one."""
    text = (
        "Fatal Python error: Segmentation fault\n\n"
        'Thread 0x01 (most recent call first):\n  File "/a/other.py", line 3 in wait\n\n'
        'Thread 0x02 (most recent call first):\n  File "/a/train.py", line 12 in step\n'
    )

    assert crash_facts(text)["file"] == "/a/train.py"
    assert crash_facts("") == {}


def test_a_crash_in_our_own_thread_is_reported_as_ours() -> None:
    """No line of the user's is in it."""
    text = (
        "Fatal Python error: Segmentation fault\n\n"
        "Current thread 0x01 (most recent call first):\n"
        f'  File "{thread_frames.__file__}", line 33 in thread_frame\n'
        f'  File "{threading.__file__}", line 982 in run\n'
    )

    assert crash_facts(text)["function"] == "thread_frame"
