"""A pool of threads that take tasks from one queue.

`parked` holds the wakers of sleeping workers and, below them, the indices of workers that have not been started yet.
While it is empty, all workers are busy, and submitting a task is one append.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from time import perf_counter

from traceml.tasks.execution import WorkerReplaced, fail, run
from traceml.tasks.task_record import TaskEngine, TaskRecord, ThreadState, Waker, set_thread_state, wake_idle_waiters
from traceml.tasks.task_statistics import COMPLETED, RUNNING

__all__ = ["ThreadPool"]

_log = logging.getLogger("traceml")


class ThreadPool:
    """Threads for the tasks of one kind.

    Args:
        size: the number of threads at most, without those blocked in tasks that have timed out.
        first: the index of the first worker.
        on_start: called after each start of a thread.
    """

    def __init__(self, name: str, size: int, first: int, engine: TaskEngine, on_start: Callable[[], object]) -> None:
        self.name, self.size, self.first = name, size, first
        self._engine, self._on_start = engine, on_start
        self.queue: deque[list[TaskRecord]] = deque()
        self._closed = False
        self.reset()

    def reset(self) -> None:
        """Start again without threads, as a forked child does."""
        self.queue.clear()
        self.workers: dict[int, ThreadState] = {}  # by the ident of their threads
        self.threads: list[threading.Thread] = []
        self.parked: list[Waker | int] = [*reversed(range(self.first, self.first + self.size))]

    def wake(self) -> None:
        """Wake a sleeping worker, or start a thread; without effect while all are busy."""
        try:
            one = self.parked.pop()
        except IndexError:
            return

        if isinstance(one, int):
            self._start(one)
        else:
            one.wake()

    def discard(self, waker: Waker) -> None:
        """Remove a waker from `parked`, and pass its wake-up on if it was used."""
        self._unpark(waker)
        if self.queue:
            self.wake()

    def _start(self, index: int) -> None:
        """Start the thread of a worker.

        Raises:
            RuntimeError: the system gives no thread, and the pool has none that could do the work instead.
        """
        thread = threading.Thread(target=self._work, args=(index,), name=f"traceml-{self.name}-{index}", daemon=True)
        self.threads.append(thread)  # before it can have a task
        try:
            thread.start()
        except RuntimeError as error:
            self.threads.remove(thread)
            self.parked.insert(0, index)
            if not self.threads:
                raise

            _log.warning("the pool %s stays at %d threads: %s", self.name, len(self.threads), error)
        else:
            self._on_start()

    def has_free_thread(self) -> bool:
        """Whether a thread without work is there for each queued task."""
        return len(self.threads) - sum(map(_is_busy, list(self.workers.values()))) >= len(self.queue)

    def is_stuck(self, stalled: set[TaskRecord]) -> bool:
        """Whether all its threads are in stalled tasks."""
        return sum(one.current in stalled for one in list(self.workers.values()) if not one.replaced) >= self.size

    def first_queued(self) -> TaskRecord | None:
        """Return the first task in the queue that has not been claimed."""
        while True:
            try:
                entry = self.queue[0]
            except IndexError:
                return None

            for task in entry:
                return task

            try:
                self.queue.remove([])  # the first claimed one
            except ValueError:
                pass

    def close(self) -> None:
        """End the workers as soon as the queue is empty; a task that is still being submitted gets a new one."""
        self._closed = True
        sleeping = [one for one in self.parked if isinstance(one, Waker)]
        self.parked[:] = [*range(self.first, self.first + self.size)]
        for one in sleeping:
            one.wake()

    def _replace(self, thread: ThreadState) -> None:
        """Let a new thread work in place of a blocked one."""
        self.parked.insert(0, thread.index)
        if self.queue:
            self.wake()

    def _work(self, index: int) -> None:
        thread = set_thread_state(ThreadState(index, self._replace))
        self.workers[thread.ident] = thread
        try:
            while not self._run_until_closed(thread):
                pass
        finally:
            try:
                self.threads.remove(threading.current_thread())  # first: until then it counts as free
            except ValueError:  # removed by a fork
                pass

            self.workers.pop(thread.ident, None)
            thread.current = None
            wake_idle_waiters()

    def _run_until_closed(self, thread: ThreadState) -> bool:
        """Run tasks until the pool is closed; False after an error outside of tasks, as MemoryError is."""
        try:
            self._run_tasks(thread)
        except WorkerReplaced:
            pass
        except BaseException as error:  # noqa: BLE001 - a task must end, or its waiters would wait without limit
            _log.exception("a worker of the pool %s failed outside of its task", self.name)
            task = thread.current
            if task is not None and task.state is RUNNING:
                fail(task, self._engine.register(thread), error)

            return False

        return True

    def _run_tasks(self, thread: ThreadState) -> None:
        take, queue, waker, statistics = self.queue.popleft, self.queue, Waker(), self._engine.statistics
        slot = self._engine.register(thread)
        counts, record = statistics.counts, statistics.records.append
        now = perf_counter()
        while True:
            try:
                task = take().pop()
            except IndexError:  # the queue is empty, or another thread has claimed the task
                if queue:
                    continue
            else:
                now = run(task, thread, counts, slot, now, record)
                continue

            task = thread.current = None  # type: ignore[assignment]  # a sleeping worker keeps no result alive
            if not self._park(thread, waker):
                return

            now = perf_counter()

    def _park(self, thread: ThreadState, waker: Waker) -> bool:
        """Sleep until there is work; False when there will be none."""
        self.parked.append(waker)
        wake_idle_waiters()
        if self._closed or thread.ident not in self.workers:  # closed, or this is the child of a fork
            self._unpark(waker)
            return bool(self.queue)

        if not self.queue or not self._unpark(waker):  # a wake-up on its way must not be left for the next time
            waker.sleep()

        return True

    def _unpark(self, waker: Waker) -> bool:
        """Remove a waker from `parked`; False when it is being woken."""
        try:
            self.parked.remove(waker)
        except ValueError:
            return False

        return True


def _is_busy(thread: ThreadState) -> bool:
    """Whether a worker has a task, or tasks below the one that has ended."""
    task = thread.current
    return task is not None and (task.state is not COMPLETED or thread.depth > 0)
