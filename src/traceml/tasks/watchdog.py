"""Ends what takes longer than it may, and says where a task stands still.

One thread per Runtime, started when there is something to watch. It sleeps until the next time-out or the next look at
the running tasks, whichever comes first.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import weakref
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from traceml.tasks.handle import TaskHandle
from traceml.tasks.running import expire
from traceml.tasks.seats import Seat
from traceml.tasks.stalls import Line, line_of_coroutine, line_of_thread
from traceml.tasks.states import FINAL, RUNNING

if TYPE_CHECKING:
    from traceml.tasks.engine import Engine

__all__ = ["Stall", "Watchdog"]

_FEW = 1024  # deadlines that are not worth a look
_LOOKS = 4  # at a task within the time after which it has stalled
_log = logging.getLogger("traceml")


@dataclass(frozen=True, slots=True)
class Stall:
    """A task that stands still: on one line, and without a report of progress."""

    task: str
    since_s: float
    where: Line


@dataclass(slots=True)
class _Look:
    task: weakref.ref[TaskHandle[Any]]
    sign: tuple[Line, float | None]
    first_s: float
    told: bool = False


class Watchdog:
    """Watches the tasks of one engine.

    Args:
        engine: whose tasks.
        stall_s: seconds on one line after which a task has stalled; None: nobody looks.
    """

    def __init__(self, engine: Engine, stall_s: float | None) -> None:
        self._engine = weakref.ref(engine)
        self.stall_s = stall_s
        self.reset()

    def reset(self) -> None:
        """Begin again without a thread, as a forked child does."""
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._order = itertools.count()
        self._deadlines: list[tuple[float, int, weakref.ref[TaskHandle[Any]], Seat | None]] = []
        self._purge_at = _FEW
        self._looks: dict[int, _Look] = {}

    def watch(self, handle: TaskHandle[Any], here: Seat | None) -> None:
        """End a task when its timeout has passed, counted from now; `here` is the thread that it is on."""
        ends_s = perf_counter() + (handle._timeout_s or 0.0)
        with self._wake:
            if len(self._deadlines) >= self._purge_at:
                self._purge()

            heapq.heappush(self._deadlines, (ends_s, next(self._order), weakref.ref(handle), here))
            self._start()
            if self._deadlines[0][0] == ends_s:
                self._wake.notify()

    def start(self) -> None:
        """Begin to look for stalls, where that is asked for."""
        if self.stall_s is not None and self._thread is None:
            with self._wake:
                self._start()

    def stalls(self) -> list[Stall]:
        """Return the tasks that stand still now."""
        now = perf_counter()
        found = []
        for look in list(self._looks.values()):
            handle = look.task()
            if handle is not None and handle._state is RUNNING and look.told:
                found.append(Stall(handle.name, now - look.first_s, look.sign[0]))

        return found

    def close(self) -> None:
        """End the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()

    def _purge(self) -> None:
        """Drop the deadlines of tasks that have ended: long ones of short tasks would pile up."""
        self._deadlines = [
            one for one in self._deadlines if (task := one[2]()) is not None and task._state not in FINAL
        ]
        heapq.heapify(self._deadlines)
        self._purge_at = max(_FEW, 2 * len(self._deadlines))

    def _start(self) -> None:
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._work, name="traceml-watchdog", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        step_s = None if self.stall_s is None else self.stall_s / _LOOKS
        look_s = perf_counter() + (step_s or 0.0)
        while not self._closed and self._engine() is not None:
            now = perf_counter()
            self._expire(now)
            if step_s is not None and now >= look_s:
                self._look(now)
                look_s = now + step_s

            self._sleep(None if step_s is None else look_s)

    def _sleep(self, look_s: float | None) -> None:
        with self._wake:
            ends = [self._deadlines[0][0]] if self._deadlines else []
            ends += [look_s] if look_s is not None else []
            if not self._closed:
                self._wake.wait(max(0.0, min(ends) - perf_counter()) if ends else None)

    def _expire(self, now: float) -> None:
        while True:
            with self._wake:
                if not self._deadlines or self._deadlines[0][0] > now:
                    return

                *_, reference, here = heapq.heappop(self._deadlines)

            handle = reference()
            if handle is not None and handle._state not in FINAL:
                _end(handle, here)

    def _look(self, now: float) -> None:
        engine = self._engine()
        seen: dict[int, _Look] = {}
        for handle, line in [] if engine is None else engine.running():
            seen[id(handle)] = self._compare(handle, (line, handle._progress), now)

        self._looks = seen

    def _compare(self, handle: TaskHandle[Any], sign: tuple[Line, float | None], now: float) -> _Look:
        look = self._looks.get(id(handle))
        if look is None or look.task() is not handle or look.sign != sign:
            return _Look(weakref.ref(handle), sign, now)

        stood_s = now - look.first_s
        if not look.told and stood_s >= (self.stall_s or 0.0) * (1 - 1 / _LOOKS / 2):
            look.told = True
            _log.warning("task %r has been on one line for %.1f s: %s", handle.name, stood_s, sign[0])

        return look


def _end(handle: TaskHandle[Any], here: Seat | None) -> None:
    """End a task whose time is over, and make up for the thread that is stuck in it."""
    loop = handle._engine.loop
    task = loop.tasks.get(handle)
    if handle in loop.tasks or here is None:
        if expire(handle, None, _at(line_of_coroutine(task.get_coro()) if task else None)):
            loop.interrupt(handle)

        return

    if not expire(handle, here, _at(line_of_thread(here.ident))):
        return

    if here.pool is not None:
        here.pool.replace(here)
    elif here.serves is not None:
        here.serves._engine.replace_stand_in(here.serves)


def _at(line: Line | None) -> str:
    return f", at {line}" if line is not None else ""
