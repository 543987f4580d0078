"""Waits of a thread in a library: for a child, of real processes, and for a lock file, in libraries that poll one."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.pool import Pool, ThreadPool
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import filelock
import pytest

from tests.eventually import eventually
from traceml.database.snapshots.blocker_snapshot import blocker_of
from traceml.inspection.kernel_state import process_info
from traceml.process_ends import end_of_status
from traceml.recorder.no_progress.library_waits import awaited_child, awaited_lock, dead_sender, library_frames

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


def end_with(status: int) -> None:
    if status < 0:
        os.kill(os.getpid(), -status)

    os._exit(status)


def next_item(queue: multiprocessing.Queue[int]) -> None:
    queue.get()


def set_elsewhere(event: threading.Event) -> None:
    event.wait()


@pytest.mark.parametrize(("statuses", "found_at"), [((3,), 0), ((0, -9), 1), ((0,), 0), ((0, None), None), ((), None)])
def test_a_process_that_was_to_send_is_found_dead(statuses: tuple[int | None, ...], found_at: int | None) -> None:
    """One that has done its work may not be the one that is waited for, while others go on."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [
        context.Process(target=time.sleep, args=(600,))
        if status is None
        else context.Process(target=end_with, args=(status,))
        for status in statuses
    ]
    for child in children:
        child.start()

    thread = threading.Thread(target=next_item, args=(queue,))
    thread.start()
    other = threading.Thread(target=set_elsewhere, args=(event := threading.Event(),))
    other.start()

    def found(ident: int | None) -> tuple[int, str] | None:
        return dead_sender(sys._current_frames().get(ident or 0), is_test)

    def has_ended(child: BaseProcess) -> bool:
        return (info := process_info(child.pid or 0)) is not None and info.state == "Z"

    try:
        ended = [child for child, status in zip(children, statuses, strict=True) if status is not None]
        eventually(lambda: all(map(has_ended, ended)), "the ends of the children")
        expected = None if found_at is None else (children[found_at].pid, end_of_status(statuses[found_at] or 0))
        eventually(lambda: found(thread.ident) == expected, "the wait for an item")
        assert found(other.ident) is None
        assert dead_sender(None, is_test) is None
    finally:
        queue.put(1)
        event.set()
        for child in children:
            child.kill()
            child.join(240)

        thread.join(240)
        other.join(240)
        queue.close()


def results_of(pool: Pool, statuses: list[int]) -> None:
    pool.map_async(end_with_or_sleep, statuses).get()


def end_with_or_sleep(status: int) -> None:
    time.sleep(0.5)  # or the kernel's clock for starts, of hundredths, tells no difference
    if status:
        end_with(status)

    time.sleep(600)


@pytest.mark.parametrize(("status", "seen"), [(-9, (0, "has died")), (0, None)])
def test_a_process_of_a_pool_is_found_dead(status: int, seen: tuple[int, str] | None) -> None:
    """The Pool starts another one, and never gives the result."""
    pool = multiprocessing.get_context("fork").Pool(2)
    first = {each.pid for each in pool._pool}  # type: ignore[attr-defined]
    thread = threading.Thread(target=results_of, args=(pool, [0, status]), daemon=True)
    thread.start()

    def calls() -> FrameType | None:
        return sys._current_frames().get(thread.ident or 0)

    def waits() -> bool:
        return any(each.f_code.co_qualname == "ApplyResult.get" for each in library_frames(calls(), is_test))

    try:
        eventually(waits, "the wait for the results")
        if status:
            eventually(lambda: {each.pid for each in pool._pool} - first, "another process")  # type: ignore[attr-defined]

        eventually(lambda: dead_sender(calls(), is_test) == seen, "the dead process, if there is one")
    finally:
        pool.terminate()


def test_a_pool_of_threads_has_no_dead_process() -> None:
    """Its threads have no process of their own."""
    event = threading.Event()
    with ThreadPool(1) as pool:
        thread = threading.Thread(target=pool.map, args=(set_elsewhere, [event]))
        thread.start()

        def calls() -> list[FrameType]:
            return list(library_frames(sys._current_frames().get(thread.ident or 0), is_test))

        try:
            eventually(lambda: any(each.f_code.co_qualname == "ApplyResult.get" for each in calls()), "the wait")
            assert dead_sender(calls()[0], is_test) is None
        finally:
            event.set()
            thread.join(240)


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


def in_filelock_4(path: Path, until: threading.Event) -> None:
    """It polls in a file of another name."""
    lock, names = SimpleNamespace(lock_file=str(path)), dict[str, Any]()
    code = "def _poll_until_acquired(self, until):\n    until.wait()"
    exec(compile(code, "/lib/filelock/_core/_acquire.py", "exec"), names)
    names["_poll_until_acquired"](lock, until)


def in_torch(path: Path, until: threading.Event) -> None:
    from torch.utils.file_baton import FileBaton

    FileBaton(str(path)).wait()
    assert until.is_set()


@pytest.mark.parametrize(("wait", "is_held"), [(in_filelock, True), (in_filelock_4, True), (in_torch, False)])
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
