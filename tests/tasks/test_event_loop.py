"""Coroutine functions run on the event loop of the Runtime."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from functools import partial

import pytest

from tests.eventually import eventually
from traceml import Runtime, TaskCancelledError, TaskDeadlockError, TaskTimeoutError
from traceml.tasks.waiting import blocked_tasks


async def double(value: int, pause: float = 0.001) -> int:
    await asyncio.sleep(pause)
    return value * 2


async def fail() -> None:
    await asyncio.sleep(0)
    raise LookupError("none")


def test_a_coroutine_function_is_awaited(rt: Runtime) -> None:
    for fn in (double, partial(double, pause=0), lambda value: double(value)):
        assert rt.submit(fn, 4).get() == 8


def test_coroutines_run_side_by_side(rt: Runtime) -> None:
    """All wait at once until the last one releases them."""
    arrived, gate = [], asyncio.Event()

    async def meet() -> None:
        arrived.append(threading.current_thread().name)
        if len(arrived) == 50:
            gate.set()

        await gate.wait()

    handles = [rt.submit(meet) for _ in range(50)]
    for handle in handles:
        handle.get(timeout=60)

    assert set(arrived) == {"traceml-loop"}


def test_a_coroutines_failure_is_that_of_its_task(rt: Runtime) -> None:
    handle = rt.submit(fail)
    with pytest.raises(LookupError, match="none") as caught:
        handle.get()

    assert caught.traceback[-1].name == "fail"
    rt.wait_all()
    assert rt.get_failed() == [handle]


def test_an_exit_in_a_coroutine_ends_no_loop(rt: Runtime) -> None:
    async def leave() -> None:
        raise SystemExit(2)

    with pytest.raises(SystemExit):
        rt.submit(leave).get()

    assert rt.submit(double, 1).get() == 2


def test_handles_are_awaited_in_coroutines(single: Runtime) -> None:
    async def parent() -> list[int]:
        return list(await asyncio.gather(*(single.submit(double, i) for i in range(20)), single.submit(len, "abc")))

    assert single.submit(parent).get(timeout=60) == [*range(0, 40, 2), 3]


def test_a_coroutine_can_be_cancelled(rt: Runtime) -> None:
    handle = rt.submit(double, 1, pause=60)
    eventually(lambda: handle.state == "running")
    assert handle.cancel()
    with pytest.raises(TaskCancelledError, match="'double' was cancelled"):
        handle.get()

    assert handle.state == "cancelled"
    assert not handle.cancel()


def test_a_coroutine_can_be_cancelled_at_once(rt: Runtime) -> None:
    """A coroutine is cancelled at any point, without a warning that it was never awaited."""
    handles = [rt.submit(double, 1) for _ in range(200)] + [rt.submit(lambda: double(1)) for _ in range(200)]
    for handle in handles:
        handle.cancel()

    rt.wait_all()
    assert {handle.state for handle in handles} <= {"cancelled", "completed"}


def test_a_coroutine_is_ended_where_its_time_is_over(rt: Runtime) -> None:
    ended = threading.Event()

    async def slow() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    handle = rt.submit(slow, timeout=0.05)
    with pytest.raises(
        TaskTimeoutError, match=r"'slow' ran longer than its timeout of 0.05 s, at .*test_event_loop.py:\d+"
    ):
        handle.get()

    assert ended.wait(60)
    eventually(lambda: rt.get_progress()["running"] == 0)
    assert rt.get_progress()["timed_out"] == 1


def test_blocking_the_loop_without_end_raises(rt: Runtime) -> None:
    """get() and wait_all() in a coroutine raise if they would block the loop that they need."""

    async def wrong_get() -> None:
        rt.submit(double, 1).get()

    async def wrong_wait_all() -> None:
        rt.wait_all()

    for wrong, advice in ((wrong_get, "use `await handle`"), (wrong_wait_all, "await the handles")):
        with pytest.raises(TaskDeadlockError, match=advice):
            rt.submit(wrong).get()


def test_a_coroutine_may_wait_for_a_callable(single: Runtime) -> None:
    """The wait blocks the loop, and ends."""

    async def blocking() -> int:
        return single.submit(len, "abc").get()

    assert single.submit(blocking).get(timeout=60) == 3


def test_a_cycle_through_a_blocked_loop_raises(single: Runtime) -> None:
    """A coroutine blocks the loop for a callable that waits for another coroutine."""
    began = threading.Event()

    def callable_task() -> int:
        began.set()
        eventually(lambda: blocked_tasks)
        return single.submit(double, 1).get()

    async def blocking() -> int:
        handle = single.submit(callable_task)
        began.wait(60)
        return handle.get()

    with pytest.raises(TaskDeadlockError):
        single.submit(blocking).get(timeout=60)


def test_waiting_for_all_leaves_out_coroutines_of_a_blocked_loop(single: Runtime) -> None:
    """A coroutine blocks the loop for a callable that waits for all: no other coroutine can end before."""
    began = threading.Event()

    def callable_task() -> str:
        began.set()
        eventually(lambda: blocked_tasks)
        single.submit(double, 1)
        single.wait_all()
        return "ended"

    async def blocking() -> str:
        handle = single.submit(callable_task)
        began.wait(60)
        return handle.get()

    handle = single.submit(blocking)
    eventually(handle.done)
    assert handle.get() == "ended"


def test_a_coroutine_that_a_callable_returned_can_be_waited_for_in_place(single: Runtime) -> None:
    def task() -> int:
        return single.submit(lambda: double(4)).get()

    assert single.submit(task).get() == 8


def test_contexts_reach_coroutines(rt: Runtime) -> None:
    variable = contextvars.ContextVar("variable", default=0)
    variable.set(7)

    async def read() -> int:
        await asyncio.sleep(0)
        return variable.get()

    assert rt.submit(read).get() == 7


def test_shutdown_waits_for_coroutines() -> None:
    with Runtime(threads=1) as rt:
        handle = rt.submit(double, 2, pause=0.05)

    assert handle.get() == 4


def test_shutdown_without_wait_lets_coroutines_end() -> None:
    rt = Runtime(threads=1)
    handle = rt.submit(double, 2, pause=0.05)
    rt.shutdown(wait=False)
    eventually(handle.done)
    assert handle.get() == 4


def test_a_callable_may_return_a_coroutine_after_the_loop_has_ended() -> None:
    """`shutdown(wait=False)` lets tasks end in the background."""
    rt, release = Runtime(threads=1), threading.Event()
    handle = rt.submit(lambda: double(3) if release.wait() else None)
    assert rt.submit(double, 1).get() == 2
    rt.shutdown(wait=False)
    thread = rt._engine.loop.thread
    assert thread is not None
    thread.join()
    release.set()

    assert handle.get(timeout=60) == 6
