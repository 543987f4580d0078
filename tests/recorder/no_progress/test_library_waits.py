"""Waits of a thread in a library: for a child, of real processes, and for a lock file, in libraries that poll one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import filelock
import pytest

from tests.eventually import eventually
from traceml.database.snapshots.blocker_snapshot import blocker_of
from traceml.recorder.no_progress.library_waits import awaited_child, awaited_lock

pytestmark = pytest.mark.process


def is_test(frame: FrameType) -> bool:
    return frame.f_code.co_filename == __file__


def waiting(child: subprocess.Popen[bytes]) -> None:
    child.wait()


def reading(child: subprocess.Popen[bytes]) -> None:
    child.communicate(timeout=600)


@pytest.mark.parametrize("wait", [waiting, reading])
def test_the_child_is_found_by_the_call_that_waits(wait: Callable[[subprocess.Popen[bytes]], None]) -> None:
    """Also where it waits for the output, and behind a shell; once the child has ended there is none."""
    with subprocess.Popen("sleep 61; true", shell=True, stdout=subprocess.PIPE, start_new_session=True) as child:
        thread = threading.Thread(target=wait, args=(child,))
        thread.start()

        def found() -> int | None:
            return awaited_child(sys._current_frames().get(thread.ident or 0), is_test)

        def program() -> str:
            seen = blocker_of(os.getpid(), threading.get_native_id(), child=found())
            return "" if seen is None else seen.name

        try:
            eventually(lambda: found() == child.pid, "the wait for the child")
            eventually(lambda: program() == "sleep", "the program behind the shell")
        finally:
            os.killpg(child.pid, 9)

        thread.join(240)
        assert not thread.is_alive()
        assert awaited_child(sys._getframe(), is_test) is None


def test_a_function_of_that_name_elsewhere_waits_for_no_child() -> None:
    """As `threading.Event.wait`."""
    event = threading.Event()
    thread = threading.Thread(target=event.wait)
    thread.start()
    try:
        eventually(lambda: thread.ident in sys._current_frames())
        assert awaited_child(sys._current_frames()[thread.ident or 0], is_test) is None
        assert awaited_child(None, is_test) is None
    finally:
        event.set()
        thread.join(240)


def in_filelock(path: Path, until: threading.Event) -> None:
    lock = filelock.FileLock(path)
    with contextlib.suppress(filelock.Timeout):
        lock.acquire(cancel_check=until.is_set)


def in_torch(path: Path, until: threading.Event) -> None:
    from torch.utils.file_baton import FileBaton

    FileBaton(str(path)).wait()
    assert until.is_set()


@pytest.mark.parametrize(("wait", "is_held"), [(in_filelock, True), (in_torch, False)])
def test_the_file_is_found_by_the_library_that_polls_it(
    tmp_path: Path, wait: Callable[[Path, threading.Event], None], is_held: bool
) -> None:
    """And who has it, where that is a lock of the kernel; torch's is there as long as the file is."""
    path, until = tmp_path / "lock", threading.Event()
    with path.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        thread = threading.Thread(target=wait, args=(path, until), daemon=True)
        thread.start()

        def found() -> str:
            return awaited_lock(sys._current_frames().get(thread.ident or 0), is_test)

        eventually(lambda: found() == str(path), "the wait for the lock")
        holder = blocker_of(0, 0, lock=str(path))
        assert (holder is not None and holder.pid > 0) if is_held else True

    until.set()
    path.unlink(missing_ok=True)
    thread.join(240)
    assert not thread.is_alive()
    assert awaited_lock(sys._getframe(), is_test) == ""
    assert blocker_of(0, 0, lock=str(path)) is None
