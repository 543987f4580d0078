"""Waits that deadlock other executors end, and waits that can never end raise."""

from __future__ import annotations

import asyncio
import random
import sys
import threading
from contextlib import suppress
from typing import Any

import pytest

from tests.eventually import eventually
from tests.tasks.conftest import threads_of_ours
from traceml import Runtime, TaskDeadlockError, TaskError, TaskHandle, TaskTimeoutError, WaitTimeoutError
from traceml.tasks.task_record import awaiting_thread
from traceml.tasks.thread_pool import ThreadPool
from traceml.tasks.waiting import blocked_tasks


@pytest.mark.parametrize("length", [99, 1000, 3000])
def test_a_chain_of_waits_needs_one_worker(single: Runtime, length: int) -> None:
    def link(left: int) -> int:
        return 1 + single.submit(link, left - 1).get() if left else 0

    assert single.submit(link, length).get() == length


def test_a_chain_of_deep_functions_keeps_off_the_recursion_limit(single: Runtime) -> None:
    """Each task uses a tenth of the stack by itself."""

    def deep(frames: int, left: int) -> int:
        if frames:
            return deep(frames - 1, left)

        return 1 + single.submit(deep, sys.getrecursionlimit() // 10, left - 1).get() if left else 0

    assert single.submit(deep, 1, 30).get() == 30


def test_a_chain_of_timed_tasks_ends(single: Runtime) -> None:
    """A task with a timeout runs on a compensating thread, which can be replaced."""

    def link(left: int) -> int:
        return 1 + single.submit(link, left - 1, timeout=60).get() if left else 0

    assert single.submit(link, 30, timeout=60).get() == 30
    eventually(lambda: "traceml-compensating" not in threads_of_ours())


def test_a_task_can_wait_with_a_limit_for_a_queued_one(single: Runtime) -> None:
    assert single.submit(lambda: single.submit(len, "abc").get(timeout=60)).get(timeout=60) == 3


def test_a_wait_in_a_task_can_run_out_of_time(single: Runtime) -> None:
    release = threading.Event()

    def task() -> str:
        with pytest.raises(WaitTimeoutError):
            single.submit(release.wait).get(timeout=0.02)

        with pytest.raises(WaitTimeoutError):
            single.wait_all(timeout=0.02)

        return "went on"

    handle = single.submit(task)
    eventually(handle.done)
    release.set()
    assert handle.get() == "went on"


def test_wait_all_in_a_task_leaves_that_task_out(single: Runtime) -> None:
    done: list[int] = []

    def task() -> list[int]:
        for i in range(20):
            single.submit(done.append, i)

        single.submit(done.append, 20, timeout=10)
        single.submit(done.append, 21, io=True)
        single.wait_all()
        return sorted(done)

    handle = single.submit(task)
    eventually(handle.done)
    assert handle.get() == list(range(22))


def test_tasks_that_all_wait_for_all_end(rt: Runtime) -> None:
    """Each leaves out the others that wait for it."""

    def node(depth: int) -> None:
        for _ in range(2 if depth else 0):
            rt.submit(node, depth - 1)

        rt.wait_all()

    for _ in range(4):
        rt.submit(node, 3)

    rt.wait_all(timeout=60)
    assert rt.get_progress()["completed"] == 4 * 15


def test_wait_all_in_a_task_that_is_itself_waited_for(single: Runtime) -> None:
    """The parent waits for the child, which waits for all but itself and its parent."""
    done: list[int] = []

    def child() -> None:
        single.submit(done.append, 1)
        single.wait_all()

    def parent() -> list[int]:
        single.submit(child).get()
        return done

    assert single.submit(parent).get(timeout=60) == [1]


def test_wait_all_runs_what_is_submitted_meanwhile(single: Runtime) -> None:
    """The only worker sleeps in wait_all while another thread submits."""
    began, release = threading.Event(), threading.Event()

    def task() -> None:
        single.submit(release.wait, io=True)
        began.set()
        single.wait_all()

    handle = single.submit(task)
    assert began.wait(60)
    eventually(lambda: handle in blocked_tasks)
    later = single.submit(len, "abc")
    eventually(later.done)
    release.set()
    eventually(handle.done)
    assert later.get() == 3


def test_nothing_runs_on_the_thread_of_a_caller_that_is_no_task(rt: Runtime) -> None:
    """The task finds neither the caller's event loop nor its thread-locals, nor a lock that the caller may re-enter."""
    local, lock = threading.local(), threading.RLock()
    local.value = "the caller's"

    def task() -> tuple[int, bool, str]:
        asyncio.run(asyncio.sleep(0))
        return threading.get_ident(), lock.acquire(blocking=False), getattr(local, "value", "none")

    async def main() -> None:
        for _ in range(200):
            with lock:
                thread, locked, value = rt.submit(task).get()

            assert (thread != threading.get_ident(), locked, value) == (True, False, "none")

    asyncio.run(main())


def test_a_task_leaves_a_queued_one_to_a_free_thread(rt: Runtime) -> None:
    """The other thread takes it, at the first wait and after it has ended a task."""

    def task() -> tuple[set[int], int]:
        here = threading.get_ident()
        return {rt.submit(threading.get_ident).get() for _ in range(200)}, here

    others, here = rt.submit(task).get()
    assert len(others) == 1
    assert here not in others


def test_a_task_runs_a_queued_one_in_place_if_no_thread_is_free(rt: Runtime) -> None:
    release = threading.Event()
    busy = rt.submit(release.wait)
    eventually(lambda: busy.state == "running")
    here, there = rt.submit(lambda: (threading.get_ident(), rt.submit(threading.get_ident).get())).get()
    release.set()
    assert here == there


def test_a_task_under_an_event_loop_of_its_own_runs_nothing_in_place(single: Runtime) -> None:
    """A task may use `asyncio.run`, also if a task waits for it inside of `asyncio.run` without a free thread."""

    def inner() -> int:
        asyncio.run(asyncio.sleep(0))
        return threading.get_ident()

    async def main() -> tuple[int, int]:
        handle = single.submit(inner)
        single.wait_all()
        return handle.get(), single.submit(inner).get()

    def outer() -> tuple[int, tuple[int, int]]:
        return threading.get_ident(), asyncio.run(main())

    here, there = single.submit(outer).get()
    assert here not in there


def test_a_thread_that_begins_a_task_looks_for_waits_that_relied_on_it(
    single: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait that found a thread free, which took another task at that moment, is compensated."""
    with monkeypatch.context() as patched:
        patched.setattr(ThreadPool, "has_free_thread", lambda pool: True)
        handle = single.submit(lambda: single.submit(len, "abc").get())
        eventually(lambda: handle in awaiting_thread)

    assert not handle.done()
    single.submit(len, "", io=True)
    assert handle.get() == 3
    assert not awaiting_thread


def test_many_tasks_may_wait_for_one(rt: Runtime) -> None:
    """Waiting tasks do not start threads."""
    release = threading.Event()
    first = rt.submit(release.wait)
    eventually(lambda: first.state == "running")
    rest = [rt.submit(first.get) for _ in range(300)]
    eventually(lambda: any(one in blocked_tasks for one in rest))
    assert len(threads_of_ours()) <= 4
    release.set()
    assert all(one.get() for one in rest)


def test_a_blocked_worker_is_compensated_for_a_coroutine(single: Runtime) -> None:
    """The worker waits for a coroutine that awaits tasks for which there is no other worker."""

    async def coroutine() -> int:
        return sum([await single.submit(len, "ab") for _ in range(3)])

    def task() -> int:
        return single.submit(coroutine).get()

    handle = single.submit(task)
    eventually(handle.done)
    assert handle.get() == 6


def test_runtimes_may_wait_for_each_other(single: Runtime, rt: Runtime) -> None:
    """The one worker of a Runtime waits for all of another, where a coroutine awaits a task that needs this worker."""

    async def coroutine() -> int:
        await asyncio.sleep(0.02)
        return await single.submit(len, "abc")

    def task() -> int:
        handle = rt.submit(coroutine)
        rt.wait_all()
        return handle.get()

    handle = single.submit(task)
    eventually(handle.done)
    assert handle.get() == 3


def test_a_task_that_waits_for_itself_raises(rt: Runtime) -> None:
    box: list[TaskHandle[Any]] = []
    ready = threading.Event()

    def task() -> None:
        ready.wait()
        box[0].get()

    box.append(rt.submit(task, name="ouroboros"))
    eventually(lambda: box[0].state == "running")
    ready.set()
    with pytest.raises(TaskDeadlockError, match="'ouroboros' waits for 'ouroboros'"):
        box[0].get()


def test_tasks_that_wait_for_each_other_raise(rt: Runtime) -> None:
    handles: list[TaskHandle[Any]] = []
    both = threading.Barrier(3)

    def task(other: int) -> object:
        both.wait(60)
        return handles[other].get()

    handles += [rt.submit(task, 1), rt.submit(task, 0)]
    both.wait(60)
    for handle in handles:
        with pytest.raises(TaskDeadlockError, match="cannot end before"):
            handle.get(timeout=60)


def test_a_child_that_waits_for_its_parent_raises(single: Runtime) -> None:
    box: list[TaskHandle[Any]] = []
    ready = threading.Event()

    def parent() -> None:
        ready.wait()
        single.submit(lambda: box[0].get(), name="child").get()

    box.append(single.submit(parent, name="parent"))
    ready.set()
    with pytest.raises(TaskDeadlockError, match="'child' waits for 'parent'"):
        box[0].get(timeout=60)


def test_waiting_in_place_keeps_the_order_of_states(single: Runtime) -> None:
    """A worker that finds the entry of a task that ran in place does not run it again."""
    ran: list[int] = []

    def parent() -> None:
        handles = [single.submit(ran.append, i) for i in range(100)]
        for handle in reversed(handles):
            handle.get()

    single.submit(parent).get()
    single.wait_all()
    assert ran == list(reversed(range(100)))
    assert single.get_progress()["completed"] == 101


class Mixture:
    """Random tasks of every kind that wait for each other in every way."""

    def __init__(self, seed: int) -> None:
        self.choose = random.Random(seed)
        self.runtimes = (Runtime(threads=self.choose.choice([1, 2]), io_threads=1), Runtime(threads=1))
        self.handles: list[TaskHandle[Any]] = []

    def spawn(self, depth: int) -> TaskHandle[Any]:
        rt = self.runtimes[self.choose.random() < 0.1]
        fn: Any = self.choose.choice(
            [self.node, self.node, self.node, self.coroutine, lambda left: self.coroutine(left)]
        )
        timeout = self.choose.choice([None] * 8 + [30, 0.002])
        self.handles.append(rt.submit(fn, depth, timeout=timeout, io=self.choose.random() < 0.1))
        return self.handles[-1]

    def node(self, depth: int) -> None:
        children = [self.spawn(depth - 1) for _ in range(self.choose.randint(0, 3) if depth else 0)]
        ways = (self.runtimes[0].wait_all, self.runtimes[1].wait_all, lambda: self.choose.choice(self.handles).get())
        for child in children:
            way = self.choose.choice([child.get, child.get, child.cancel, lambda child=child: child.get(60), *ways])
            with suppress(TaskError, TimeoutError):
                way()

    async def coroutine(self, depth: int) -> None:
        children = [self.spawn(depth - 1) for _ in range(self.choose.randint(0, 3) if depth else 0)]
        for child in children:
            with suppress(TaskError, TimeoutError):
                if self.choose.random() < 0.2:
                    child.get()  # blocks the loop: an error where that could not end

                await child


@pytest.mark.parametrize("seed", [*range(15), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(15, 40))])
def test_any_mixture_of_waits_ends(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    """Nested waits across Runtimes and loops, with timeouts and cycles, never hang, and the counts add up."""
    mixture = Mixture(seed)
    for _ in range(5):
        mixture.spawn(4)

    for rt in (*mixture.runtimes, mixture.runtimes[0]):
        rt.wait_all(timeout=60)

    for rt in mixture.runtimes:
        rt.shutdown()
        found = rt.get_progress(tasks=False)
        ended = found["completed"] + found["failed"] + found["cancelled"] + found["timed_out"]
        assert found["total"] == ended, found
        assert {type(one.exception) for one in rt.get_failed()} <= {TaskDeadlockError, TaskTimeoutError}
