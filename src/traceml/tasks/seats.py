"""Who sits where: the task that each thread is in, and what the tasks wait for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from traceml.tasks.handle import TaskHandle
from traceml.tasks.states import QUEUED

if TYPE_CHECKING:
    from traceml.tasks.engine import Engine
    from traceml.tasks.loop import Loop
    from traceml.tasks.pool import Pool

__all__ = [
    "Seat",
    "asleep",
    "coroutine_task",
    "current_task",
    "entangled",
    "forget_waits",
    "queued_behind",
    "reaches",
    "seat",
    "sit",
    "waiting",
]

# A coroutine's task is told by its context: many share one thread.
coroutine_task: ContextVar[TaskHandle[Any] | None] = ContextVar("traceml_coroutine_task", default=None)
_here = threading.local()
asleep: set[TaskHandle[Any]] = set()  # tasks whose threads sleep until another task has ended
# What each waiting task waits for: other tasks, or all of an engine. In order, and for all runtimes of the process.
_waits: dict[TaskHandle[Any], list[TaskHandle[Any] | Engine]] = {}


class Seat:
    """A thread that runs tasks, in a pool or while it waits."""

    __slots__ = ("current", "depth", "ident", "index", "loop", "pool", "replaced", "serves")

    def __init__(self, pool: Pool | None = None, index: int = -1) -> None:
        self.ident = threading.get_ident()
        self.current: TaskHandle[Any] | None = None
        self.depth = 0  # tasks below the current one, which wait for it on this thread
        self.pool = pool
        self.index = index
        self.loop: Loop | None = None  # that this thread is the thread of
        self.serves: TaskHandle[Any] | None = None  # the task that waits while this thread runs what it needs
        self.replaced = False  # its task timed out, and another thread has taken its place in the pool


def seat() -> Seat:
    """Return the seat of this thread."""
    try:
        return _here.seat  # type: ignore[no-any-return]
    except AttributeError:
        return sit(Seat())


def sit(here: Seat) -> Seat:
    """Make a seat that of this thread."""
    _here.seat = here
    return here


def current_task() -> TaskHandle[Any] | None:
    """Return the task that this code runs in; None outside of any."""
    return seat().current or coroutine_task.get()


@contextmanager
def waiting(task: TaskHandle[Any] | None, target: TaskHandle[Any] | Engine) -> Iterator[None]:
    """Hold that a task waits for a target; code outside of tasks holds nobody up."""
    if task is None:
        yield
        return

    _waits.setdefault(task, []).append(target)
    try:
        yield
    finally:
        targets = _waits.get(task, [])
        if target in targets:  # not in the child of a fork
            targets.remove(target)

        if not targets:
            _waits.pop(task, None)


def entangled(task: TaskHandle[Any] | None) -> set[TaskHandle[Any]]:
    """Return a task and all that cannot end before it: those that wait for it, for its runtime, or for one of these."""
    if task is None:
        return set()

    known: set[Any] = {task, task._engine}
    pairs = [(waiter, tuple(targets)) for waiter, targets in list(_waits.items())]
    while more := ({waiter for waiter, targets in pairs if not known.isdisjoint(targets)} | _held_up(known)) - known:
        known |= more | {waiter._engine for waiter in more}

    return {one for one in known if isinstance(one, TaskHandle)}


def _held_up(known: set[Any]) -> set[TaskHandle[Any]]:
    """Return the coroutines whose loop is blocked by one of these tasks."""
    loops = [one._engine.loop for one in known if isinstance(one, TaskHandle)]
    return {task for loop in loops if loop.blocked in known for task in list(loop.tasks)}


def reaches(start: TaskHandle[Any], goal: TaskHandle[Any]) -> bool:
    """Whether a task waits for another, over however many between them."""
    return any(one is goal for one in _followed(start))


def queued_behind(start: TaskHandle[Any]) -> TaskHandle[Any] | None:
    """Find a task that is still queued and that a task, over however many between them, waits for."""
    for one in _followed(start, through_all=True):
        if one._state is QUEUED and one._ticket:
            return one

    return None


def _followed(start: TaskHandle[Any], *, through_all: bool = False) -> Iterator[TaskHandle[Any]]:
    """Yield a task and what it waits for; with `through_all` also what all tasks do that it waits for together."""
    seen: set[Any] = set()
    ahead: list[Any] = [start]
    while ahead:
        one = ahead.pop()
        if one in seen:
            continue

        seen.add(one)
        if isinstance(one, TaskHandle):
            yield one
            ahead += _waits.get(one, ())
            ahead += one._engine.loop.blockers(one)
        elif through_all:
            ahead += [waiter for waiter in list(_waits) if waiter._engine is one]
            ahead += one.queued()


def forget_waits() -> None:
    """Drop what was waited for in the process that this one was forked from."""
    _waits.clear()
    asleep.clear()
