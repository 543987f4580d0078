"""Time-outs of tasks, and warnings about stalled ones.

One thread per Runtime, started when there is a task to watch. It sleeps until the next time-out or the next check of
the running tasks, whichever comes first.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import perf_counter

from traceml.tasks.code_location import CodeLocation, location_of_coroutine, location_of_thread
from traceml.tasks.execution import expire
from traceml.tasks.task_record import FINAL, RUNNING, TaskRecord, ThreadState

__all__ = ["StalledTask", "TaskWatchdog"]

_MIN_PURGE = 1024  # fewer deadlines are not searched for ended tasks
_CHECKS = 4  # of a task within the time after which it has stalled
_log = logging.getLogger("traceml")


@dataclass(frozen=True, slots=True)
class StalledTask:
    """A task that stays on one line and reports no progress."""

    name: str
    seconds: float
    location: CodeLocation


@dataclass(slots=True)
class _Observation:
    task: weakref.ref[TaskRecord]
    seen: tuple[CodeLocation, float | None]
    first_s: float
    warned: bool = False


class TaskWatchdog:
    """Watches the tasks of one engine.

    Args:
        running: returns the running tasks, each with its line.
        stall_s: seconds on one line after which a task has stalled; None: tasks are not checked.
    """

    def __init__(self, running: Callable[[], Iterable[tuple[TaskRecord, CodeLocation]]], stall_s: float | None) -> None:
        self._running, self._stall_s = running, stall_s
        self.reset()

    def reset(self) -> None:
        """Start again without a thread, as a forked child does."""
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._order = itertools.count()
        self._deadlines: list[tuple[float, int, weakref.ref[TaskRecord], ThreadState | None]] = []
        self._purge_at = _MIN_PURGE
        self._observations: dict[int, _Observation] = {}

    def watch(self, task: TaskRecord, thread: ThreadState | None) -> None:
        """End a task when its timeout has passed, counted from now; `thread` runs it, None for a coroutine."""
        ends_s = perf_counter() + (task.timeout_s or 0.0)
        with self._changed:
            if len(self._deadlines) >= self._purge_at:
                self._purge()

            heapq.heappush(self._deadlines, (ends_s, next(self._order), weakref.ref(task), thread))
            self._start()
            if self._deadlines[0][0] == ends_s:
                self._changed.notify()

    def start(self) -> None:
        """Start to check for stalls, where this is asked for."""
        if self._stall_s is not None and self._thread is None:
            with self._changed:
                self._start()

    def stalled(self) -> list[StalledTask]:
        """Return the tasks that are stalled now."""
        now = perf_counter()
        found = []
        for one in list(self._observations.values()):
            task = one.task()
            if task is not None and task.state is RUNNING and one.warned:
                found.append(StalledTask(task.name, now - one.first_s, one.seen[0]))

        return found

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _purge(self) -> None:
        """Drop the deadlines of ended tasks: long timeouts of short tasks would pile up."""
        self._deadlines = [one for one in self._deadlines if (task := one[2]()) is not None and not task.done()]
        heapq.heapify(self._deadlines)
        self._purge_at = max(_MIN_PURGE, 2 * len(self._deadlines))

    def _start(self) -> None:
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._work, name="traceml-watchdog", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        interval_s = None if self._stall_s is None else self._stall_s / _CHECKS
        check_s = perf_counter() + (interval_s or 0.0)
        while not self._closed:
            now = perf_counter()
            self._expire(now)
            if interval_s is not None and now >= check_s:
                self._check(now)
                check_s = now + interval_s

            self._sleep(None if interval_s is None else check_s)

    def _sleep(self, check_s: float | None) -> None:
        with self._changed:
            ends = [self._deadlines[0][0]] if self._deadlines else []
            ends += [check_s] if check_s is not None else []
            if not self._closed:
                self._changed.wait(max(0.0, min(ends) - perf_counter()) if ends else None)

    def _expire(self, now: float) -> None:
        while True:
            with self._changed:
                if not self._deadlines or self._deadlines[0][0] > now:
                    return

                *_, reference, thread = heapq.heappop(self._deadlines)

            task = reference()
            if task is not None and task.state not in FINAL:
                _time_out(task, thread)

    def _check(self, now: float) -> None:
        self._observations = {
            id(task): self._observe(task, (location, task.last_progress), now) for task, location in self._running()
        }

    def _observe(self, task: TaskRecord, seen: tuple[CodeLocation, float | None], now: float) -> _Observation:
        before = self._observations.get(id(task))
        if before is None or before.task() is not task or before.seen != seen:
            return _Observation(weakref.ref(task), seen, now)

        seconds = now - before.first_s
        if not before.warned and seconds >= (self._stall_s or 0.0) * (1 - 1 / _CHECKS / 2):
            before.warned = True
            _log.warning("task %r has been on one line for %.1f s: %s", task.name, seconds, seen[0])

        return before


def _time_out(task: TaskRecord, thread: ThreadState | None) -> None:
    """End a task whose time is over, and replace the thread that it blocks."""
    loop = task.engine.loop
    if task in loop.tasks or thread is None:
        running = loop.tasks.get(task)
        if expire(task, None, _at(location_of_coroutine(running.get_coro()) if running else None)):
            task.engine.interrupt(task)

        return

    if expire(task, thread, _at(location_of_thread(thread.ident))) and thread.replace is not None:
        thread.replace(thread)


def _at(location: CodeLocation | None) -> str:
    return f", at {location}" if location is not None else ""
