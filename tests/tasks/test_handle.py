"""Handles: states, waits with a limit, cancelling, awaiting."""

from __future__ import annotations

import asyncio
import threading
import time
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from tests.eventually import eventually
from traceml import ArgumentTypeError, Runtime, TaskCancelledError, UsageError, WaitTimeoutError, flush, sync


@pytest.mark.parametrize("timeout", ["1", b"1", True, [1], 10**400])
def test_a_timeout_that_is_no_number_is_an_error_of_the_package(rt: Runtime, timeout: Any) -> None:
    """A text gave the TypeError of a comparison, and the largest integers an OverflowError."""
    handle = rt.submit(threading.Event().wait, 0.2)
    for call in (handle.get, handle.wait, rt.wait_all, flush, sync):
        with pytest.raises(ArgumentTypeError, match="a timeout must be a number of seconds, or None for no limit, not"):
            call(timeout=timeout)

    with pytest.raises(UsageError, match="it must be a positive number of seconds"):
        rt.submit(len, "a", timeout=timeout)


def test_nan_is_no_timeout(rt: Runtime) -> None:
    """`wait_all` gave up at once: "1 task had not ended after nan s"."""
    handle = rt.submit(threading.Event().wait, 0.2)
    for call in (handle.get, handle.wait, rt.wait_all, flush, sync):
        with pytest.raises(UsageError, match="not float nan"):
            call(timeout=float("nan"))


def test_numbers_of_any_kind_are_timeouts_and_sizes() -> None:
    with Runtime(threads=np.int64(1), io_threads=np.uint8(2)) as runtime:
        assert (runtime.threads, runtime.io_threads) == (1, 2)
        handle = runtime.submit(len, "abc", timeout=np.float32(60))
        runtime.wait_all(timeout=Fraction(60))
        assert handle.get(timeout=Decimal(60)) == 3

    with pytest.raises(UsageError, match="whole number of threads"):
        Runtime(threads=10**400)


def test_states_follow_the_task(single: Runtime) -> None:
    release = threading.Event()
    first, second = single.submit(release.wait), single.submit(len, "a")
    eventually(lambda: first.state == "running")
    assert (second.state, second.done(), second.exception) == ("queued", False, None)
    release.set()
    single.wait_all()
    assert (first.state, second.state) == ("completed", "completed")
    assert second.exception is None


def test_handles_are_numbered_as_submitted(rt: Runtime) -> None:
    async def coroutine() -> None:
        pass

    handles = [rt.submit(len, "a"), rt.submit(coroutine), rt.submit(len, 1, io=True)]
    assert [handle.task_id for handle in handles] == [0, 1, 2]
    rt.wait_all()


@pytest.mark.parametrize("method", ["get", "wait"])
def test_a_wait_can_run_out_of_time(single: Runtime, method: str) -> None:
    """A wait with a limit runs neither a running nor a queued task in place, as it could not leave it."""
    release = threading.Event()
    running, queued = single.submit(release.wait, name="slow"), single.submit(time.sleep, 30)
    for handle in (running, queued):
        with pytest.raises(WaitTimeoutError, match=r"task '\w+' is still (running|queued) after 0.02 s"):
            getattr(handle, method)(0.02)

    assert queued.cancel()
    release.set()
    assert running.get(timeout=60) is True


def test_wait_raises_the_error_and_returns_nothing(rt: Runtime) -> None:
    assert rt.submit(len, "a").wait() is None
    with pytest.raises(TypeError):
        rt.submit(len, 1).wait()


def test_cancel_takes_a_queued_task_away(single: Runtime) -> None:
    release, ran = threading.Event(), []
    running, queued = single.submit(release.wait), single.submit(ran.append, 1, name="late")
    eventually(lambda: running.state == "running")
    assert queued.cancel()
    assert not queued.cancel()
    assert not running.cancel()
    release.set()
    single.wait_all()

    assert ran == []
    assert queued.state == "cancelled"
    with pytest.raises(TaskCancelledError, match="task 'late' was cancelled"):
        queued.get()

    assert single.get_failed() == []
    progress = single.get_progress()
    assert (progress["total"], progress["completed"], progress["cancelled"]) == (2, 1, 1)


def test_cancel_wakes_who_waits(single: Runtime) -> None:
    release = threading.Event()
    single.submit(release.wait)
    queued = single.submit(len, "a")
    threading.Timer(0.05, queued.cancel).start()
    with pytest.raises(TaskCancelledError):
        queued.get(timeout=60)

    release.set()


def test_many_threads_may_wait_for_one_task(rt: Runtime) -> None:
    release, results = threading.Event(), []
    handle = rt.submit(lambda: release.wait() and 5)
    eventually(lambda: handle.state == "running")
    waiters = [threading.Thread(target=lambda: results.append(handle.get())) for _ in range(8)]
    for waiter in waiters:
        waiter.start()

    eventually(lambda: len(handle.callbacks or ()) == 8)
    release.set()
    for waiter in waiters:
        waiter.join(60)

    assert results == [5] * 8


def test_a_handle_can_be_awaited_on_any_loop(rt: Runtime) -> None:
    async def main() -> list[object]:
        slow, failing = rt.submit(release.wait), rt.submit(len, 1)
        for _ in range(4):
            await asyncio.sleep(0.005)

        assert not slow.done()
        release.set()
        with pytest.raises(TypeError):
            await failing

        return [await rt.submit(len, "abc"), await slow]

    release = threading.Event()
    assert asyncio.run(main()) == [3, True]


def test_leaving_an_await_leaves_the_task(single: Runtime) -> None:
    """A cancelled awaiter does not cancel its task, and a closed loop does not disturb it."""
    release = threading.Event()
    handle = single.submit(release.wait)
    eventually(lambda: handle.state == "running")

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(handle, 0.02)

        asyncio.get_running_loop().create_task(_forever(handle))
        await asyncio.sleep(0.01)

    asyncio.run(main())
    assert handle.state == "running"
    release.set()
    assert handle.get() is True


async def _forever(handle: object) -> None:
    await handle  # type: ignore[misc]


def test_a_handle_of_another_runtime_can_be_waited_for(rt: Runtime, single: Runtime) -> None:
    """It runs on a thread of its own Runtime, and is counted there."""

    def task() -> int:
        here = threading.get_ident()
        assert rt.submit(threading.get_ident).get() != here
        return rt.submit(len, "ab").get(timeout=60)

    assert single.submit(task).get() == 2
    assert single.get_progress()["total"] == 1
    assert rt.get_progress()["completed"] == 2


def test_an_error_without_a_text_is_listed_all_the_same(rt: Runtime) -> None:
    """The error of its `__str__` took the place of the list of failures, and of the progress."""

    class Mute(Exception):
        def __str__(self) -> str:
            raise KeyError("text")

    def fail() -> None:
        raise Mute

    rt.submit(fail, name="mute")
    with pytest.raises(RuntimeError, match=r"1 task\(s\) failed: mute: Mute: <its text failed: KeyError>"):
        rt.wait_all(raise_on_error=True)

    assert rt.get_progress()["errors"] == [{"task": "mute", "error": "Mute: <its text failed: KeyError>"}]
