"""All that a Runtime runs on; handles keep it, and not the Runtime, alive."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

from traceml.errors import RuntimeClosedError, TaskForkedError
from traceml.tasks import running
from traceml.tasks.handle import TaskHandle
from traceml.tasks.ledger import Ledger
from traceml.tasks.loop import Loop
from traceml.tasks.pool import Pool
from traceml.tasks.seats import current_task, entangled, seat
from traceml.tasks.stalls import Line, line_of_coroutine, line_of_thread
from traceml.tasks.states import FAILED, FINAL, RUNNING, TIMED_OUT
from traceml.tasks.waiting import stand_in
from traceml.tasks.watchdog import Watchdog

__all__ = ["Engine"]

ErrorCallback = Callable[[TaskHandle[Any], BaseException], object]


class Engine:
    """Pools, loop, watchdog and books of one Runtime.

    Args:
        threads: workers for callables.
        io_threads: workers for callables that wait more than they compute.
        stall_s: seconds on one line after which a task has stalled; None: nobody looks.
    """

    def __init__(self, threads: int, io_threads: int, stall_s: float | None) -> None:
        self.ledger = Ledger()
        self.watchdog = Watchdog(self, stall_s)
        self.compute = Pool("compute", threads, 0, self.ledger, self.watchdog.start)
        self.io = Pool("io", io_threads, threads, self.ledger, self.watchdog.start)
        self.pools = (self.compute, self.io)
        self.loop = Loop(self.ledger, self.watchdog.start)
        self.error_callback: ErrorCallback | None = None
        self.stand_ins: set[TaskHandle[Any]] = set()  # tasks that wait while a thread runs what they need
        self.closing = self.closed = self.abandoned = False
        self.count_submission: Callable[[], int] = self.ledger.count_submission

    def queued(self) -> list[TaskHandle[Any]]:
        """Return the tasks that are first in the queues."""
        return [handle for pool in self.pools if (handle := pool.peek()) is not None]

    def in_progress(self) -> list[TaskHandle[Any]]:
        """Return the tasks that threads are in, and the coroutines."""
        sitting = [here.current for here in list(self.ledger.seats.values())]
        running = [one for one in sitting if one is not None and one._engine is self and one._state is RUNNING]
        return running + [one for one in list(self.loop.tasks) if one._state is RUNNING]

    def running(self) -> Iterator[tuple[TaskHandle[Any], Line]]:
        """Yield the tasks that run now, and the line that each is on."""
        for here in list(self.ledger.seats.values()):
            handle = here.current
            if handle is not None and handle._engine is self and handle._state is RUNNING:
                yield handle, line_of_thread(here.ident) or Line("", 0, handle.name)

        for handle, task in list(self.loop.tasks.items()):
            if task is not None and handle._state is RUNNING:
                yield handle, line_of_coroutine(task.get_coro()) or Line("", 0, handle.name)

    def cancel(self, handle: TaskHandle[Any]) -> bool:
        """End a task that has not begun, or a coroutine; False when it is too late for that."""
        try:
            handle._ticket.pop()
        except IndexError:
            return self.loop.cancel(handle)

        running.cancelled(handle, None)
        return True

    def give_up(self, handle: TaskHandle[Any]) -> None:
        """End a task that no thread can be started for."""
        handle._ticket.clear()
        running.cancelled(handle, None)

    def cancel_queued(self) -> None:
        """Cancel all that has not begun, and the coroutines; nobody will wait for the rest."""
        self.abandoned = True
        for pool in self.pools:
            while handle := pool.take():
                running.cancelled(handle, None)

        for handle in list(self.loop.tasks):
            self.loop.cancel(handle)

    def replace_stand_in(self, waiter: TaskHandle[Any]) -> None:
        """Let another thread stand in, as the one that did is stuck."""
        self.stand_ins.discard(waiter)
        stand_in(waiter)

    def begin_closing(self) -> None:
        """Take tasks from tasks only."""
        self.closing = True
        self.count_submission = self._refuse

    def close(self, *, wait: bool) -> None:
        """Let threads end when there is nothing left to do; `wait` for those that are not stuck."""
        self.closing = self.closed = True
        self.count_submission = self._refuse
        for pool in self.pools:
            pool.close()

        self.watchdog.close()
        self.loop.close(wait=wait)
        if wait:
            self._join()

    def _join(self) -> None:
        """Wait for the threads of workers; not for those in a task that has timed out, or that waits for this one."""
        held = entangled(current_task())
        for pool in self.pools:
            stuck = {one.ident for one in pool.workers.values() if one.current in held or _is_late(one.current)}
            for thread in pool.threads.copy():
                if thread.ident not in stuck and thread is not threading.current_thread():
                    thread.join()

    def _refuse(self) -> int:
        me = current_task()
        if self.closed or me is None or all(one._engine is not self for one in entangled(me)):
            raise RuntimeClosedError("this Runtime is shut down and takes no more tasks; make a new Runtime")

        return self.ledger.count_submission()

    def after_fork(self) -> None:
        """Make a forked child's copy usable: no threads, no tasks; what was under way belongs to the parent."""
        orphans = self._orphans()
        self.ledger.lock = threading.RLock()
        self.ledger.clear()
        self.ledger.sleepers.clear()
        self.loop.lock = threading.RLock()
        for part in (*self.pools, self.loop, self.watchdog):
            part.reset()

        self.stand_ins.clear()
        if not self.closing:
            self.count_submission = self.ledger.count_submission

        for handle in orphans:
            handle._outcome = (TaskForkedError(_FORKED.format(handle.name)), None)
            handle._state = FAILED

    def _orphans(self) -> list[TaskHandle[Any]]:
        mine = entangled(seat().current) | {seat().current}
        known = [handle for pool in self.pools for ticket in pool.queue for handle in ticket]
        known += [here.current for here in self.ledger.seats.values() if here.current is not None]
        known += [*self.loop.tasks, *self.stand_ins]
        return [one for one in known if one not in mine and one._state not in FINAL and one._engine is self]


def _is_late(handle: TaskHandle[Any] | None) -> bool:
    return handle is not None and handle._state is TIMED_OUT


_FORKED = (
    "task {0!r} belongs to the process that this one was forked from, and will not end here. "
    "Submit it again, or get its result before the fork."
)
