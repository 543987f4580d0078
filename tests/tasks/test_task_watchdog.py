"""Timeouts end tasks, not pools; stalled tasks are named with their line."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from tests.eventually import eventually
from tests.tasks.conftest import threads_of_ours
from traceml import Runtime, TaskTimeoutError
from traceml.tasks import task_watchdog
from traceml.tasks.task_watchdog import location_of_thread


class Clock:
    """Time of the watchdogs, which passes when a test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def forward(self, rt: Runtime, seconds: float) -> None:
        """Let time pass once the watchdog sleeps, and wake it."""
        changed: Any = rt._engine.watchdog._changed
        eventually(lambda: changed._waiters)
        self.now_s += seconds
        with changed:
            changed.notify_all()

    def until_checked(self, rt: Runtime, seconds: float) -> None:
        """Let the time between two looks at the running tasks pass, and wait until they have been looked at."""
        before = rt._engine.watchdog._observations
        self.forward(rt, seconds)
        eventually(lambda: rt._engine.watchdog._observations is not before)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of all watchdogs."""
    clock = Clock()
    monkeypatch.setattr(task_watchdog, "perf_counter", clock)
    return clock


def lingers() -> bool:
    """Return whether a thread is on the line of `linger` that waits."""
    places = (location_of_thread(thread.ident or 0) for thread in threading.enumerate())
    return any(place and (place.function, place.line) == ("linger", LINGERS) for place in places)


def _name(function: Callable[..., object]) -> str:
    return function.__code__.co_qualname


def linger(release: threading.Event) -> str:
    release.wait()  # the line
    return "late"


LINGERS = linger.__code__.co_firstlineno + 1


def test_a_timeout_counts_from_the_start(clock: Clock, single: Runtime) -> None:
    """Time in the queue does not count."""
    release, begun = threading.Event(), threading.Event()

    async def awaiting() -> None:
        begun.set()
        await asyncio.sleep(1e6)

    single.submit(release.wait)
    queued = single.submit(lambda: "in time", timeout=4)
    ended = single.submit(awaiting, timeout=4.05)
    assert begun.wait(60)
    clock.forward(single, 4.1)
    with pytest.raises(TaskTimeoutError):  # after that of the queue, if it had one
        ended.get()

    release.set()
    assert queued.get() == "in time"


def test_a_task_beyond_its_time_is_ended(clock: Clock, single: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    release, seen = threading.Event(), []
    single.set_error_callback(lambda handle, error: seen.append(handle.state))
    handle = single.submit(linger, release, timeout=2.5, name="slow")
    eventually(lingers)
    clock.forward(single, 2.5)
    with pytest.raises(TaskTimeoutError, match=r"'slow' ran longer .* 2.5 s, at .*_watchdog.py:\d+ in linger"):
        handle.get()

    eventually(lambda: seen == ["timed_out"])
    assert isinstance(handle.exception, TimeoutError)
    assert single.get_failed() == [handle]
    with pytest.raises(RuntimeError, match=r"1 task\(s\) failed: slow: TaskTimeoutError"):
        single.wait_all(raise_on_error=True)  # does not wait for the thread

    progress = single.get_progress()
    assert (progress["total"], progress["timed_out"], progress["failed"], progress["running"]) == (1, 1, 0, 0)
    release.set()


def test_stuck_threads_are_replaced_and_let_go(single: Runtime) -> None:
    """The pool keeps its size while tasks are stuck, and after they have returned."""
    release = threading.Event()
    stuck = [single.submit(linger, release, timeout=0.02) for _ in range(3)]
    eventually(lambda: all(one.done() for one in stuck))
    assert single.submit(len, "abc").get(timeout=60) == 3
    assert len([name for name in threads_of_ours() if "compute" in name]) == 4

    release.set()
    eventually(lambda: len([name for name in threads_of_ours() if "compute" in name]) == 1)
    assert [one.state for one in stuck] == ["timed_out"] * 3
    assert single.submit(len, "abc").get(timeout=60) == 3
    eventually(lambda: single.get_progress()["running"] == 0)
    assert (single.get_progress()["completed"], single.get_progress()["total"]) == (2, 5)


def test_timeouts_end_tasks_where_the_system_gives_no_thread(rt: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """The watchdog calls the error callback itself, and lives on."""
    release, seen = threading.Event(), list[str]()
    rt.set_error_callback(lambda handle, error: seen.append(handle.name))
    start = threading.Thread.start

    def start_others(thread: threading.Thread) -> None:
        if thread.name == "traceml-report":
            raise RuntimeError("can't start new thread")

        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_others)
    stuck = [rt.submit(linger, release, timeout=timeout, name=f"{timeout}") for timeout in (0.02, 0.04)]
    try:
        eventually(lambda: len(seen) == len(stuck))
        rt.wait_all()
    finally:
        release.set()

    assert sorted(seen) == ["0.02", "0.04"]


def test_a_task_that_fails_late_has_timed_out(single: Runtime) -> None:
    release = threading.Event()

    def late() -> None:
        release.wait()
        raise ValueError

    handle = single.submit(late, timeout=0.02)
    eventually(handle.done)
    release.set()
    eventually(lambda: len([name for name in threads_of_ours() if "compute" in name]) <= 1)
    assert handle.state == "timed_out"
    assert single.get_progress()["failed"] == 0


def test_a_stuck_compensating_thread_is_replaced(single: Runtime) -> None:
    """The worker waits for all, and the first of all is stuck."""
    release = threading.Event()

    def parent() -> list[str]:
        handles = [single.submit(linger, release, timeout=0.05), single.submit(len, "ab", timeout=60)]
        single.wait_all()
        return [one.state for one in handles]

    handle = single.submit(parent)
    eventually(handle.done)
    release.set()
    assert handle.get() == ["timed_out", "completed"]


def test_a_compensating_thread_that_is_stuck_in_another_runtime_is_replaced(single: Runtime, rt: Runtime) -> None:
    release = threading.Event()

    def parent() -> int:
        with pytest.raises(TaskTimeoutError):
            rt.submit(linger, release, timeout=0.05).get()

        return single.submit(len, "ab", timeout=60).get()

    for _ in range(2):
        rt.submit(release.wait)

    handle = single.submit(parent)
    eventually(handle.done)
    release.set()
    assert handle.get() == 2


def test_a_runtime_has_a_default_timeout() -> None:
    release = threading.Event()
    with Runtime(threads=1, timeout=0.05) as rt:
        with pytest.raises(TaskTimeoutError):
            rt.submit(linger, release).get()

        assert rt.submit(time.sleep, 0.1, timeout=10).get() is None
        release.set()


def test_the_end_of_a_runtime_waits_for_no_stuck_thread() -> None:
    release = threading.Event()
    with Runtime(threads=1) as rt:
        handle = rt.submit(linger, release, timeout=0.02)
        eventually(handle.done)

    release.set()


def test_a_timeout_that_was_not_needed_keeps_nothing() -> None:
    class Value:
        pass

    with Runtime(threads=1) as rt:
        handle = rt.submit(Value, timeout=1000)
        kept = weakref.ref(handle.get(timeout=60))
        del handle
        eventually(lambda: kept() is None)


def test_deadlines_of_ended_tasks_do_not_pile_up() -> None:
    with Runtime(threads=1, timeout=1000) as rt:
        for _ in range(5000):
            rt.submit(int)

        rt.wait_all()
        assert len(rt._engine.watchdog._deadlines) <= 1024


def test_a_stalled_task_is_named_with_its_line(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    release, held = threading.Event(), threading.Lock()
    held.acquire()

    async def awaiting() -> None:
        while not release.is_set():  # noqa: ASYNC110 - the line that it stands on is the point
            await asyncio.sleep(0.2)

    with Runtime(threads=2, stall_after=1) as rt:
        rt.submit(linger, release, name="stuck")
        rt.submit(held.acquire, name="direct")
        rt.submit(awaiting)
        eventually(lingers)

        def all_stalled() -> list[dict[str, Any]] | None:
            clock.until_checked(rt, 0.25)
            return found if len(found := rt.get_progress()["stalled"]) == 3 else None

        stalled = {one["task"]: one for one in eventually(all_stalled)}  # `awaiting` moves again soon
        release.set()
        held.release()

    assert (stalled["stuck"]["file"], stalled["stuck"]["line"]) == (__file__, LINGERS)
    assert stalled["stuck"]["function"] == "linger"
    assert stalled["stuck"]["seconds"] >= 0.05
    assert stalled["direct"]["function"] == "direct"
    assert stalled["awaiting"]["function"].endswith("awaiting")
    assert f"test_task_watchdog.py:{LINGERS} in linger" in caplog.text
    assert rt.get_progress()["stalled"] == []


def test_a_lock_held_across_a_wait_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """The line that holds it, of a task on the same stack, of a task on another thread, and of the program."""
    table = threading.Lock()

    def needs_it() -> None:
        with table:
            pass

    def holds_it(rt: Runtime) -> None:
        with table:
            rt.submit(needs_it, name="needs").get()

    for threads in (1, 2):
        with Runtime(threads=threads, stall_after=1) as rt:  # by then they have come to their lines
            handle = rt.submit(holds_it, rt, name="holds")
            eventually(lambda rt=rt: any(one["task"] == "needs" for one in rt.get_progress()["stalled"]))
            waiters = [one["waiters"] for one in rt.get_progress()["stalled"] if one["task"] == "needs"]
            line = holds_it.__code__.co_firstlineno + 2
            assert waiters == [[{"task": "holds", "file": __file__, "line": line, "function": _name(holds_it)}]]
            table.release()  # what `needs` waits for
            with suppress(RuntimeError):
                handle.get()  # its `with` finds the lock released already

    assert "in test_a_lock_held_across_a_wait_is_named.<locals>.needs_it, `with table:`" in caplog.text
    assert f"Waiting for it: task 'holds' at {__file__}:{line} in" in caplog.text
    assert "If that code holds a lock that 'needs' needs, release the lock before the wait" in caplog.text


def test_a_lock_that_the_program_holds_across_a_wait_is_named(caplog: pytest.LogCaptureFixture) -> None:
    table = threading.Lock()

    def needs_it() -> None:
        with table:
            pass

    def release() -> None:
        try:
            eventually(lambda: "Waiting for it" in caplog.text)
        finally:
            table.release()

    with Runtime(threads=1, stall_after=1) as rt:
        table.acquire()
        releasing = threading.Thread(target=release)
        releasing.start()
        rt.submit(needs_it, name="needs").get()
        releasing.join()

    assert f"Waiting for it: the program at {__file__}:" in caplog.text
    assert "in test_a_lock_that_the_program_holds_across_a_wait_is_named, `rt.submit(needs_it" in caplog.text


def test_a_runtime_whose_threads_are_all_stalled_is_not_responsive(caplog: pytest.LogCaptureFixture) -> None:
    release = threading.Event()

    async def blocks_the_loop() -> None:
        release.wait()

    with Runtime(threads=2, io_threads=1, stall_after=0.1) as rt:
        assert rt.is_responsive()
        rt.submit(linger, release)
        eventually(lambda: len(rt.get_progress()["stalled"]) == 1)
        assert rt.is_responsive()
        rt.submit(linger, release)
        eventually(lambda: not rt.is_responsive())
        release.set()
        eventually(rt.is_responsive)

        release.clear()
        rt.submit(blocks_the_loop)
        eventually(lambda: not rt.is_responsive())
        release.set()

    assert not rt.is_responsive()


def test_a_task_that_reports_is_not_stalled(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    turn = threading.Semaphore(0)

    def work() -> None:
        for pct in range(20):
            rt.progress(pct)
            turn.acquire()

    with Runtime(threads=1, stall_after=5) as rt:
        handle = rt.submit(work)
        for pct in range(20):
            eventually(lambda pct=pct: handle.last_progress == pct)
            clock.until_checked(rt, 1.25)
            turn.release()

        handle.get(timeout=60)

    assert caplog.text == ""


def test_a_dropped_runtime_ends_its_watchdog() -> None:
    rt = Runtime(threads=1, stall_after=0.2)
    rt.submit(len, "", timeout=10).wait()
    del rt
    gc.collect()


def test_a_line_is_that_of_the_users_code() -> None:
    """The line is not one of the standard library, in which the thread waits."""
    release = threading.Event()
    thread = threading.Thread(target=linger, args=(release,))
    thread.start()
    eventually(lambda: (line := location_of_thread(thread.ident or 0)) is not None and line.function == "linger")
    release.set()
    thread.join()
    assert location_of_thread(thread.ident or 0) is None
