"""Waits for tasks, without deadlock.

A thread that runs no task waits as for any pool. A task leaves a queued one to a free thread of its pool. Without one,
it runs the queued task in place of the wait, or a compensating thread does: where the wait has a limit, the task has a
timeout or belongs to another Runtime, the stack is deep, or an event loop runs on the thread. At most one such thread
exists per waiting task, for as long as it waits. A wait that can never end raises an error at once.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from time import perf_counter

from traceml.coerce import seconds_to_wait
from traceml.errors import TaskDeadlockError, WaitTimeoutError
from traceml.formatting import plural
from traceml.tasks.execution import WorkerReplaced, run_claimed
from traceml.tasks.task_record import (
    TaskEngine,
    TaskRecord,
    ThreadState,
    Waker,
    awaiting_thread,
    current_task,
    idle_waiters,
    set_thread_state,
    thread_state,
    wake_idle_waiters,
)
from traceml.tasks.task_statistics import FINAL
from traceml.tasks.wait_graph import (
    blocked_set,
    depends_on,
    forget_dependencies,
    queued_dependencies,
    waiting_for,
)

__all__ = ["await_for", "blocked_tasks", "compensate_all", "forget_waits", "wait_for", "wait_for_all"]

_MAX_DEPTH = 100  # tasks on one stack
blocked_tasks: set[TaskRecord] = set()  # tasks whose threads sleep until another task has ended
_compensated: set[TaskRecord] = set()  # tasks that wait while another thread runs the tasks that they need
_log = logging.getLogger("traceml")


def wait_for(task: TaskRecord, timeout: float | None) -> None:
    """Return when a task has ended.

    Raises:
        ArgumentTypeError: `timeout` is no number.
        WaitTimeoutError: `timeout` seconds have passed.
        TaskDeadlockError: the task cannot end before the one that waits.
    """
    thread, me, timeout = thread_state(), current_task(), seconds_to_wait(timeout)
    if timeout is None and _runs_in_place(task, thread) and task.claim():
        _run_in_place(task, thread)

    if task.state not in FINAL:  # also where it has returned a coroutine, which continues elsewhere
        _block(task, me, timeout)


def _runs_in_place(task: TaskRecord, thread: ThreadState) -> bool:
    """Whether a thread runs a queued task in place of its wait: no other thread of the pool would."""
    if task.timeout_s is not None or not _may_run_tasks(thread, task.engine):
        return False

    return task.pool is not None and not task.pool.has_free_thread()


def _may_run_tasks(thread: ThreadState, engine: TaskEngine) -> bool:
    """Whether queued tasks of an engine may run on this thread: it runs one already, without an event loop."""
    inside = thread.current is not None and thread.current.engine is engine
    return inside and not _is_deep(thread) and asyncio._get_running_loop() is None


def _is_deep(thread: ThreadState) -> bool:
    """Whether the stack has no room for more tasks."""
    if thread.depth == 0:
        return False

    if thread.depth >= _MAX_DEPTH:
        return True

    try:
        sys._getframe(sys.getrecursionlimit() * 6 // 10)
    except ValueError:
        return False

    return True


def _run_in_place(task: TaskRecord, thread: ThreadState) -> None:
    """Run a claimed task on top of the one that waits for it."""
    underneath = thread.current
    thread.depth += 1
    try:
        with waiting_for(current_task(), task):
            run_claimed(task, thread)
    finally:
        thread.current, thread.depth = underneath, thread.depth - 1
        wake_idle_waiters()


def _block(task: TaskRecord, me: TaskRecord | None, timeout: float | None) -> None:
    """Sleep until a task has ended that other threads run."""
    waker = Waker()
    _refuse_deadlock(me, task)
    if not task.add_callback(waker.wake):
        return

    if me is None:
        woken = waker.sleep(_limit(timeout))
    else:
        with waiting_for(me, task), _blocked(me):
            wake_idle_waiters()  # wait_all leaves out the tasks that wait for its own
            _refuse_deadlock(me, task)  # of two that close a cycle at once, one sees the other here
            woken = _sleep(waker, me, timeout)

    if not woken:
        task.remove_callback(waker.wake)
        if task.state not in FINAL:
            raise WaitTimeoutError(f"task {task.name!r} is still {task.state} after {timeout:g} s")


def _refuse_deadlock(me: TaskRecord | None, task: TaskRecord) -> None:
    _refuse_cycle(me, task, "waits for")
    if task in task.engine.loop.tasks and task.engine.loop.is_here():
        raise TaskDeadlockError(
            f"get() would block the event loop that coroutine {task.name!r} runs on; use `await handle` there"
        )


def _refuse_cycle(me: TaskRecord | None, task: TaskRecord, waits_for: str) -> None:
    if me is not None and (me is task or depends_on(task, me)):
        raise TaskDeadlockError(f"task {me.name!r} {waits_for} {task.name!r}, which cannot end before {me.name!r} does")


def _sleep(waker: Waker, me: TaskRecord | None, timeout: float | None) -> bool:
    """Sleep until woken; a compensating thread runs the tasks that this one waits for, if no other thread does."""
    if me is not None:
        _compensate(me)

    thread = thread_state()
    if thread.compensates is not None and thread.replace is not None:
        thread.replace(thread)  # this thread does nothing for its task while it sleeps

    return waker.sleep(_limit(timeout))


def _limit(timeout: float | None) -> float:
    return -1 if timeout is None else min(max(0.0, timeout), threading.TIMEOUT_MAX)


@contextmanager
def _blocked(me: TaskRecord | None) -> Iterator[None]:
    """Record that the thread of a task, and the loop on it, does nothing else now."""
    if me is None:
        yield
        return

    blocked_tasks.add(me)
    try:
        with _blocking_loop(me):
            yield
    finally:
        blocked_tasks.discard(me)
        awaiting_thread.discard(me)


def _blocking_loop(me: TaskRecord | None) -> AbstractContextManager[None]:
    """Record that nothing else runs on this thread's event loop, where it has one."""
    loop = thread_state().loop
    return nullcontext() if loop is None or me is None else loop.blocked_by(me)


def _compensate(me: TaskRecord) -> None:
    """Start a thread for the queued tasks that a waiting task needs, unless free threads take them."""
    awaiting_thread.add(me)  # first: a thread that begins a task from here on calls this again
    queued = [] if me in _compensated else list(queued_dependencies(me))
    if queued and all(one.pool is not None and one.pool.has_free_thread() for one in queued):
        return

    awaiting_thread.discard(me)
    if queued:
        _start_compensating(me)


def compensate_all() -> None:
    """Repeat the check for the tasks that wait for a queued one: a thread that was free has begun a task."""
    for me in tuple(awaiting_thread):
        _compensate(me)


def _start_compensating(me: TaskRecord) -> None:
    thread = threading.Thread(target=_run_dependencies, args=(me,), name="traceml-compensating", daemon=True)
    _compensated.add(me)
    try:
        thread.start()
    except RuntimeError as error:
        _compensated.discard(me)
        _log.warning("task %r waits, and no thread can be started for the tasks that it needs: %s", me.name, error)


def _run_dependencies(me: TaskRecord) -> None:
    thread = set_thread_state(ThreadState(replace=_replace_compensating, compensates=me))
    try:
        while task := next(queued_dependencies(me), None):
            if task.claim():
                run_claimed(task, thread)
                thread.current = None
                wake_idle_waiters()
    except WorkerReplaced:
        return

    _compensated.discard(me)
    _compensate(me)  # for tasks that were queued since


def _replace_compensating(thread: ThreadState) -> None:
    """Start another compensating thread, as this one is blocked."""
    if thread.compensates is not None:
        _compensated.discard(thread.compensates)
        _compensate(thread.compensates)


def forget_waits() -> None:
    """Drop the waits of the process that this one was forked from, but for those on this thread's task."""
    forget_dependencies(blocked_set(thread_state().current))
    blocked_tasks.clear()
    _compensated.clear()
    awaiting_thread.clear()
    idle_waiters.clear()


async def await_for(task: TaskRecord) -> None:
    """Wait for a task on any event loop, which continues meanwhile."""
    me, loop = current_task(), asyncio.get_running_loop()
    _refuse_cycle(me, task, "awaits")
    ended = asyncio.Event()
    call = partial(loop.call_soon_threadsafe, ended.set)
    if not task.add_callback(call):
        return

    with waiting_for(me, task):
        wake_idle_waiters()
        if blocked_tasks and any(queued_dependencies(task)):
            for blocked in tuple(blocked_tasks):  # they may hold all workers, and wait for this one
                _compensate(blocked)

        try:
            await ended.wait()
        finally:
            task.remove_callback(call)


def wait_for_all(engine: TaskEngine, timeout: float | None) -> None:
    """Return when all tasks of an engine have ended, except the calling task and those that wait for it.

    Raises:
        ArgumentTypeError: `timeout` is no number.
        WaitTimeoutError: `timeout` seconds have passed.
        TaskDeadlockError: this is the engine's event loop, on which its coroutines could not continue.
    """
    if engine.loop.is_here():
        raise TaskDeadlockError("wait_all() would block the event loop; await the handles, or asyncio.gather(*handles)")

    me, timeout = current_task(), seconds_to_wait(timeout)
    ends_s = None if timeout is None else perf_counter() + timeout
    in_place = timeout is None and _may_run_tasks(thread_state(), engine)
    with waiting_for(me, engine), _blocking_loop(me):
        wake_idle_waiters()
        while left := _unfinished(engine, me):
            if in_place and (task := _runnable(engine)):
                if task.claim():
                    _run_in_place(task, thread_state())

                continue

            if not _park(engine, me, ends_s, in_place=in_place):
                raise WaitTimeoutError(f"{plural(left, 'task')} had not ended after {timeout:g} s")


def _unfinished(engine: TaskEngine, me: TaskRecord | None) -> int:
    """Count the tasks that are still to be waited for."""
    return engine.count_unfinished({one for one in blocked_set(me) if one.engine is engine})


def _runnable(engine: TaskEngine) -> TaskRecord | None:
    """Return a queued task that this thread runs in place of its wait."""
    thread = thread_state()
    return next((task for task in engine.next_queued() if _runs_in_place(task, thread)), None)


def _park(engine: TaskEngine, me: TaskRecord | None, ends_s: float | None, *, in_place: bool) -> bool:
    """Sleep until a task ends or is submitted; False when the time is over."""
    waker = Waker()
    idle_waiters.append(waker)
    if me is not None:
        engine.add_waker(waker)

    try:
        if not _unfinished(engine, me) or (in_place and _runnable(engine)):
            return True

        with _blocked(me):
            return _sleep(waker, me, None if ends_s is None else ends_s - perf_counter())
    finally:
        try:
            idle_waiters.remove(waker)
        except ValueError:  # it was woken
            pass

        if me is not None:
            engine.remove_waker(waker)
