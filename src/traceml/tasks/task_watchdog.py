"""Timeouts of tasks, and warnings about stalled ones.

One thread per Runtime, started when there is a task to watch. It sleeps until the next timeout or the next check of
the running tasks, whichever comes first.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import linecache
import logging
import sysconfig
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Any

from traceml.inspection.thread_frames import running_line, stack_frames, thread_frame, thread_frames
from traceml.tasks.execution import expire
from traceml.tasks.task_record import TaskRecord, ThreadState
from traceml.tasks.task_statistics import FINAL, RUNNING
from traceml.tasks.waiting import wait_for

__all__ = ["TaskWatchdog", "location_of_thread"]

_MIN_PURGE = 1024  # fewer deadlines are not searched for ended tasks
_CHECKS = 4  # of a task within the time after which it has stalled
_OWN = str(Path(__file__).parent)
_STDLIB = sysconfig.get_path("stdlib")
_log = logging.getLogger("traceml")


@dataclass(frozen=True, slots=True)
class _CodeLocation:
    """A line of Python; without a file for a function that is not written in Python."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        if not self.file:
            return f"inside {self.function}, no Python code"

        source = linecache.getline(self.file, self.line).strip()
        return f"{self.file}:{self.line} in {self.function}" + (f", `{source}`" if source else "")


@dataclass(frozen=True, slots=True)
class _Waiter:
    """A thread that waits for a task in `get` or `wait`; the task is empty for a thread that runs none."""

    task: str
    location: _CodeLocation


@dataclass(slots=True)
class _Observation:
    """The line that a task is on, and its last report of progress."""

    task: weakref.ref[TaskRecord]
    location: _CodeLocation
    progress: float | None
    since_s: float
    warned: bool = False
    waiters: tuple[_Waiter, ...] = ()


class TaskWatchdog:
    """Watches the tasks of one engine.

    Args:
        running: returns the running tasks, each with its thread or coroutine.
        stall_s: seconds on one line after which a task has stalled; None: tasks are not checked.
    """

    def __init__(self, running: Callable[[], Iterable[tuple[TaskRecord, Any]]], stall_s: float | None) -> None:
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

    def stalled(self) -> list[dict[str, Any]]:
        """Return the tasks that are stalled now, as `get_progress()` lists them."""
        now = perf_counter()
        return [
            {
                "task": task.name,
                "seconds": now - one.since_s,
                **_fields(one.location),
                "waiters": [{"task": waiter.task, **_fields(waiter.location)} for waiter in one.waiters],
            }
            for task, one in self._stalled()
        ]

    def stalled_tasks(self) -> set[TaskRecord]:
        """Return the tasks that are stalled now."""
        return {task for task, _ in self._stalled()}

    def _stalled(self) -> Iterator[tuple[TaskRecord, _Observation]]:
        for one in list(self._observations.values()):
            task = one.task()
            if one.warned and task is not None and task.state is RUNNING:
                yield task, one

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
                self._observations = {id(task): self._observe(task, runner, now) for task, runner in self._running()}
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

    def _observe(self, task: TaskRecord, runner: Any, now: float) -> _Observation:
        location, progress = _location_of(runner) or _CodeLocation("", 0, task.name), task.last_progress
        before = self._observations.get(id(task))
        if before is None or before.task() is not task or (before.location, before.progress) != (location, progress):
            return _Observation(weakref.ref(task), location, progress, now)

        seconds = now - before.since_s
        if not before.warned and seconds >= (self._stall_s or 0.0) * (1 - 1 / _CHECKS / 2):
            before.warned, before.waiters = True, tuple(_waiters_of(task))
            _log.warning(
                "task %r has been on one line for %.1f s: %s%s",
                task.name,
                seconds,
                location,
                _advice(task.name, before.waiters),
            )

        return before


def _advice(name: str, waiters: tuple[_Waiter, ...]) -> str:
    """Name the threads that wait for a stalled task: one that holds a lock meanwhile may be the cause."""
    lines = "; ".join(f"{f'task {one.task!r}' if one.task else 'the program'} at {one.location}" for one in waiters)
    if not lines:
        return ""

    return f". Waiting for it: {lines}. If that code holds a lock that {name!r} needs, release the lock before the wait"


def _waiters_of(task: TaskRecord) -> Iterator[_Waiter]:
    """Find the threads that wait for a task by their frames, also below a task that runs in place."""
    for ident, frame in thread_frames().items():
        for waiting in stack_frames(frame):
            if waiting.f_code is wait_for.__code__ and waiting.f_locals.get("task") is task:
                me = waiting.f_locals.get("me")
                location = next((_location(one) for one in stack_frames(waiting) if not _is_foreign(one)), None)
                yield _Waiter("" if me is None else me.name, location or _CodeLocation("", 0, f"thread {ident}"))


def _fields(location: _CodeLocation) -> dict[str, Any]:
    return {"file": location.file, "line": location.line, "function": location.function}


def _time_out(task: TaskRecord, thread: ThreadState | None) -> None:
    """End a task whose time is over, and replace the thread that it blocks."""
    coroutines = task.engine.loop.tasks
    if task in coroutines:  # also one that a callable on a thread returned
        thread = None

    location = _location_of(coroutines.get(task) if thread is None else thread)
    if not expire(task, thread, f", at {location}" if location is not None else ""):
        return

    if thread is None:
        task.engine.interrupt(task)
    elif thread.replace is not None:
        thread.replace(thread)


def _location_of(runner: ThreadState | asyncio.Task[Any] | None) -> _CodeLocation | None:
    if isinstance(runner, ThreadState):
        return location_of_thread(runner.ident)

    return None if runner is None else _location_of_coroutine(runner.get_coro())


def location_of_thread(ident: int) -> _CodeLocation | None:
    """Return the innermost line of a thread, in the user's code if there is any."""
    innermost = thread_frame(ident)
    found = next((frame for frame in stack_frames(innermost) if not _is_foreign(frame)), innermost)
    return None if found is None or found.f_code.co_filename.startswith(_OWN) else _location(found)


def _location_of_coroutine(coroutine: Any) -> _CodeLocation | None:
    """Return the innermost line of the user's code that a coroutine awaits on."""
    frames = []
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None)
        if frame is not None:
            frames.append(frame)

        coroutine = getattr(coroutine, "cr_await", None)

    for frame in reversed(frames):
        if not _is_foreign(frame):
            return _location(frame)

    return None


def _is_foreign(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    library = file.startswith(_STDLIB) and "site-packages" not in file
    return library or file.startswith((_OWN, "<frozen"))


def _location(frame: FrameType) -> _CodeLocation:
    return _CodeLocation(frame.f_code.co_filename, running_line(frame), frame.f_code.co_qualname)
