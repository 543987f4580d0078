"""Pools, event loop, watchdog and statistics of one Runtime, and the handlers for exit and forks of the process."""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # noqa: F401 - its handler for the exit has to run after the one below
import logging
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator
from typing import Any

from traceml.errors import RuntimeClosedError, TaskForkedError
from traceml.formatting import error_text
from traceml.tasks import execution
from traceml.tasks.event_loop import EventLoop
from traceml.tasks.task_record import TaskRecord, ThreadState, Waker, current_task, thread_state, wake_idle_waiters
from traceml.tasks.task_statistics import FAILED, QUEUED, RECORDS, RUNNING, TIMED_OUT, TaskStatistics
from traceml.tasks.task_watchdog import TaskWatchdog
from traceml.tasks.thread_pool import ThreadPool
from traceml.tasks.wait_graph import blocked_set, waiting_tasks
from traceml.tasks.waiting import compensate_all, forget_waits, wait_for_all

__all__ = ["Engine"]

_log = logging.getLogger("traceml")


class Engine:
    """Everything that runs the tasks of one Runtime; handles keep it alive, not the Runtime.

    Args:
        io_threads: workers for callables that wait more than they compute.
        stall_s: seconds on one line after which a task has stalled; None: tasks are not checked.
    """

    def __init__(self, threads: int, io_threads: int, stall_s: float | None) -> None:
        self.statistics = TaskStatistics()
        self.watchdog = TaskWatchdog(self.running, stall_s)
        self.compute = ThreadPool("compute", threads, 0, self, self.watchdog.start)
        self.io = ThreadPool("io", io_threads, threads, self, self.watchdog.start)
        self.pools = (self.compute, self.io)
        self.loop = EventLoop(self, self.watchdog.start)
        self.watch = self.watchdog.watch
        self.run_coroutine, self.interrupt = self.loop.run_coroutine, self.loop.interrupt
        self.compensate_waits = compensate_all
        self.error_callback: Callable[[Any, BaseException], object] | None = None
        self.failures: list[TaskRecord] = []
        self.callback_errors: deque[tuple[str, str]] = deque(maxlen=RECORDS)
        self.closed = self.discarded = False
        self._closing = False
        self._threads: dict[int, ThreadState] = {}
        self._reporting: set[TaskRecord] = set()  # failed, and their error callback has not returned yet
        self.count_submission: Callable[[], int] = self.statistics.count_submission
        _engines.add(self)

    def register(self, thread: ThreadState) -> int:
        """Make a thread known that runs tasks; return its slot in the statistics."""
        self._threads[thread.ident] = thread  # idents are used again, and so are their slots
        return self.statistics.slot_of(thread.ident)

    def is_responsive(self) -> bool:
        """Whether a task that is submitted now would run: no pool, nor the event loop, is held by stalled tasks."""
        stalled = self.watchdog.stalled_tasks()
        stuck = any(pool.is_stuck(stalled) for pool in self.pools) or self.loop.current() in stalled
        return not self._closing and not stuck

    def next_queued(self) -> list[TaskRecord]:
        """Return the first task of each queue."""
        return [task for pool in self.pools if (task := pool.first_queued()) is not None]

    def running(self) -> Iterator[tuple[TaskRecord, ThreadState | asyncio.Task[Any] | None]]:
        """Yield the running tasks, each with its thread or with its coroutine."""
        for thread in list(self._threads.values()):
            task = thread.current
            if task is not None and task.engine is self and task.state is RUNNING:
                yield task, thread

        for task, running in list(self.loop.tasks.items()):
            if task.state is RUNNING:
                yield task, running

    def count_unfinished(self, exempt: set[TaskRecord]) -> int:
        """Count the other tasks that have not ended, or whose error callback has not returned."""
        reporting = len(self._reporting - exempt)
        counts = self.statistics.snapshot()
        return counts[RUNNING] + counts[QUEUED] + reporting - sum(not task.done() for task in exempt)

    def add_waker(self, waker: Waker) -> None:
        """Wake a thread when a task is submitted that no worker is free for."""
        for pool in self.pools:
            pool.parked.insert(0, waker)

    def remove_waker(self, waker: Waker) -> None:
        """Undo `add_waker`."""
        for pool in self.pools:
            pool.discard(waker)

    def cancel(self, task: TaskRecord) -> bool:
        """End a task that has not begun, or a coroutine; False when it is too late."""
        if not task.claim():
            return self.loop.cancel(task)

        execution.cancel(task)
        return True

    def reject(self, task: TaskRecord) -> None:
        """End a task whose submission did not complete, unless it has begun."""
        if task.claim() or (task.pool is None and task.state is QUEUED):
            execution.cancel(task)

    def cancel_queued(self) -> None:
        """Cancel coroutines and the tasks that have not begun; the interpreter's exit does not wait for the rest."""
        self.discarded = True
        for pool in self.pools:
            while task := pool.first_queued():
                self.cancel(task)

        for task in list(self.loop.tasks):
            self.loop.cancel(task)

    def keep_failure(self, task: TaskRecord) -> None:
        """Add a task to the failed ones; the statistics' lock is held."""
        self.failures.append(task)
        self._reporting.add(task)

    def report_failure(self, task: TaskRecord, error: BaseException) -> None:
        """Call the error callback; an error of its own is logged and kept for `get_progress()`."""
        thread = thread_state()
        before, thread.current = thread.current, task
        try:
            if self.error_callback is not None:
                self.error_callback(task, error)
        except BaseException as failure:  # noqa: BLE001 - a callback's error is logged, and ends no worker
            _log.exception("the error callback failed for task %r", task.name)
            self.callback_errors.append((task.name, f"error callback: {error_text(failure)}"))
        finally:
            thread.current = before
            self._reporting.discard(task)
            wake_idle_waiters()

    def begin_closing(self) -> None:
        """Accept tasks from running tasks only."""
        self._closing = True
        self.count_submission = self._count_while_closing

    def close(self, *, wait: bool) -> None:
        """End each thread as soon as it has no work; `wait` for those that are not blocked."""
        self.begin_closing()
        self.closed = True
        for pool in self.pools:
            pool.close()

        self.watchdog.close()
        self.loop.close(wait=wait)
        if wait:
            self._join()

    def _join(self) -> None:
        """Wait for the workers, except those in a task that has timed out or that waits for this thread's."""
        blocked = blocked_set(current_task())
        for pool in self.pools:
            stuck = {
                thread.ident
                for thread in pool.workers.values()
                if thread.current in blocked or (thread.current is not None and thread.current.state is TIMED_OUT)
            }
            for worker in pool.threads.copy():
                if worker.ident not in stuck and worker is not threading.current_thread() and worker.is_alive():
                    worker.join()

    def _count_while_closing(self) -> int:
        if self.closed or all(task.engine is not self for task in blocked_set(current_task())):
            raise RuntimeClosedError("this Runtime is shut down and takes no more tasks; make a new Runtime")

        return self.statistics.count_submission()

    def after_fork(self) -> None:
        """Make a forked child's copy usable: no threads, and no tasks but those that this thread runs."""
        me = thread_state().current
        mine = blocked_set(me) | {me}
        orphans = self._orphans(mine)
        self.statistics.reset(sum(task is not None and task.engine is self and not task.done() for task in mine))
        self._threads.clear()
        self._reporting.clear()
        for part in (*self.pools, self.loop, self.watchdog):
            part.reset()

        if not self._closing:
            self.count_submission = self.statistics.count_submission

        for task in orphans:
            task.outcome = (TaskForkedError(_FORKED.format(task.name)), None)
            task.state = FAILED

    def _orphans(self, mine: Collection[TaskRecord | None]) -> list[TaskRecord]:
        """Return the tasks of this engine that only a thread of the parent could end."""
        known = [task for pool in self.pools for entry in pool.queue for task in entry]
        known += [thread.current for thread in self._threads.values() if thread.current is not None]
        known += [*self.loop.tasks, *waiting_tasks()]
        return [task for task in known if task not in mine and not task.done() and task.engine is self]


_FORKED = (
    "task {0!r} belongs to the process that this one was forked from, and will not end here. "
    "Submit it again, or get its result before the fork."
)

_engines: weakref.WeakSet[Engine] = weakref.WeakSet()  # of this process, for its exit and its forks


def _before_exit() -> None:
    """Wait for tasks before the interpreter ends; not after Ctrl-C, and not after `shutdown(cancel=True)`."""
    if getattr(sys, "last_type", None) is KeyboardInterrupt:
        return

    before = None
    while before != (before := _submissions()):  # tasks may submit to another Runtime, or make one
        for engine in before:
            wait_for_all(engine, None)

    for engine in before:
        engine.close(wait=True)


def _submissions() -> dict[Engine, int]:
    """Count the tasks that were submitted to each engine that the exit waits for."""
    return {engine: engine.statistics.snapshot()["total"] for engine in list(_engines) if not engine.discarded}


def _after_fork() -> None:
    for engine in list(_engines):
        engine.after_fork()

    forget_waits()


os.register_at_fork(after_in_child=_after_fork)
# Earlier than atexit, while threads can still be started; concurrent.futures ends its pools here too.
threading._register_atexit(_before_exit)  # type: ignore[attr-defined]
