"""The record of a task, the state of the thread that runs it, wake-ups, and the interface of its engine."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import Context, ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from traceml.errors import NotCallableError
from traceml.tasks.task_statistics import FINAL, TaskStatistics

__all__ = [
    "LoopState", "TaskEngine", "TaskPool", "TaskRecord", "ThreadState", "Waker", "awaiting_thread", "coroutine_task",
    "current_task", "idle_waiters", "is_coroutine", "name_of", "set_thread_state", "shorten", "thread_state",
    "wake_idle_waiters",
]  # fmt: skip


def shorten(qualname: str) -> str:
    """Drop the functions around a definition: `test.<locals>.Pipeline.run` is `Pipeline.run`."""
    return qualname.rpartition("<locals>.")[2]


def name_of(fn: Any) -> str:
    """Derive a name: of a function, `Class.method`, `<lambda>`, what a partial wraps, or an object's class."""
    while isinstance(fn, partial):
        fn = fn.func

    try:
        name = fn.__qualname__
    except Exception:  # noqa: BLE001 - a callable's own `__getattr__` may raise anything, and a name is not worth it
        name = None

    return shorten(name if isinstance(name, str) else type(fn).__qualname__)


def is_coroutine(fn: Any) -> bool:
    """Whether a callable of any kind is a coroutine function.

    Raises:
        NotCallableError: it cannot be called at all.
    """
    if not callable(fn):
        raise NotCallableError(
            f"submit() takes a callable and its arguments, not {type(fn).__name__} {fn!r:.80}. "
            "Pass the function itself: rt.submit(f, x), not rt.submit(f(x))."
        )

    while isinstance(fn, partial):
        fn = fn.func

    try:
        return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(type(fn).__call__)
    except Exception:  # noqa: BLE001 - as in `name_of`; a coroutine that it returns all the same is awaited
        return False


@dataclass(init=False, repr=False, eq=False, slots=True, weakref_slot=True)
class TaskRecord:
    """One submitted task.

    The queue holds the task's entry, a list with the task in it. The thread that pops the task from the entry runs it:
    this is one atomic operation, and an entry that is left in the queue keeps no result alive.
    """

    args: tuple[Any, ...]
    callbacks: list[Callable[[], object]] | None  # called when the task ends
    context: Context | None
    engine: TaskEngine
    entry: list[TaskRecord]
    fn: Callable[..., Any] | None
    given_name: str | None  # or the derived one, as soon as it is needed
    kwargs: Mapping[str, Any] | None
    last_progress: float | None
    outcome: Any  # the result; (exception, its traceback) when there is none
    pool: TaskPool | None  # None for a coroutine function
    started_s: float
    state: str
    submitted_s: float
    task_id: int
    timeout_s: float | None

    @property
    def name(self) -> str:
        """The name that was given, or the callable's."""
        fn, name = self.fn, self.given_name  # in this order: the name is set before the callable is dropped
        if name is None:
            name = self.given_name = name_of(fn)

        return name

    def done(self) -> bool:
        """Whether the task has ended, with or without a result."""
        return self.state in FINAL

    def claim(self) -> bool:
        """Take the task from the queue, to run or to cancel it; False when another thread was first."""
        try:
            self.entry.pop()
        except IndexError:
            return False

        return True

    def add_callback(self, call: Callable[[], object]) -> bool:
        """Have something called when the task ends; False when it has ended, and nothing will be called."""
        with self.engine.statistics.lock:
            if self.callbacks is None:
                self.callbacks = []

            self.callbacks.append(call)

        return self.state not in FINAL

    def remove_callback(self, call: Callable[[], object]) -> None:
        """Remove a callback that has not been called yet."""
        try:
            (self.callbacks or []).remove(call)
        except ValueError:  # it was called
            pass


class ThreadState:
    """The task that the calling thread runs, in a pool or while it waits.

    Args:
        index: the number of the worker; -1 for a thread of no pool.
        replace: starts another thread in place of this one, when a task that has timed out blocks it.
        compensates: the task that waits while this thread runs the tasks that it needs.
    """

    __slots__ = ("compensates", "current", "depth", "ident", "index", "loop", "replace", "replaced")

    def __init__(
        self,
        index: int = -1,
        replace: Callable[[ThreadState], object] | None = None,
        compensates: TaskRecord | None = None,
    ) -> None:
        self.ident = threading.get_ident()
        self.index, self.replace, self.compensates = index, replace, compensates
        self.current: TaskRecord | None = None
        self.depth = 0  # tasks below the current one, which wait for it on this thread
        self.loop: LoopState | None = None  # the event loop that runs on this thread
        self.replaced = False  # its task timed out, and another thread has taken its place


_local = threading.local()
# The task of a coroutine is found by its context: many share one thread.
coroutine_task: ContextVar[TaskRecord | None] = ContextVar("traceml_coroutine_task", default=None)


def thread_state() -> ThreadState:
    """Return the state of this thread."""
    try:
        return _local.state  # type: ignore[no-any-return]
    except AttributeError:
        return set_thread_state(ThreadState())


def set_thread_state(state: ThreadState) -> ThreadState:
    """Make a state that of this thread."""
    _local.state = state
    return state


def current_task() -> TaskRecord | None:
    """Return the task that this code runs in; None outside of any."""
    return thread_state().current or coroutine_task.get()


class LoopState:
    """The thread of an event loop, its coroutines, and the task that blocks it."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start again without a thread, as a forked child does."""
        self.thread: threading.Thread | None = None
        self.tasks: dict[TaskRecord, Any] = {}  # with the asyncio.Task of each that has begun
        self.blocker: TaskRecord | None = None  # the task that keeps the thread from all others

    def is_here(self) -> bool:
        """Whether this is the loop's thread."""
        return threading.current_thread() is self.thread

    @contextmanager
    def blocked_by(self, task: TaskRecord) -> Iterator[None]:
        """Record that a task blocks the loop's thread, which calls this."""
        before, self.blocker = self.blocker, task
        try:
            yield
        finally:
            self.blocker = before


class Waker:
    """Wakes one thread once; a second wake-up has no effect."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def wake(self) -> None:
        """Wake the thread that sleeps, or the next one that sleeps here."""
        try:
            self._lock.release()
        except RuntimeError:  # another thread has done it
            pass

    def sleep(self, timeout_s: float = -1) -> bool:
        """Sleep until `wake` is called; False when the time is over first."""
        return self._lock.acquire(timeout=timeout_s)


# Tasks that wait for a queued one and leave it to a free thread; a thread that begins a task checks that one is left.
awaiting_thread: set[TaskRecord] = set()

# Threads in wait_all, of every Runtime: a task of one may wait for tasks of another.
idle_waiters: list[Waker] = []


def wake_idle_waiters() -> None:
    """Let all threads in wait_all check again: a task has ended, or waits itself."""
    while idle_waiters:
        try:
            idle_waiters.pop().wake()
        except IndexError:  # another thread was faster
            return


class TaskPool(Protocol):
    """The pool that a task is queued in."""

    def has_free_thread(self) -> bool:
        """Whether a thread without work is there for each queued task."""


class TaskEngine(Protocol):
    """Services of a Runtime's engine to its tasks."""

    statistics: TaskStatistics

    def compensate_waits(self) -> None:
        """Start threads for the tasks that waiting ones need, where none is free any more."""

    @property
    def loop(self) -> LoopState:
        """The event loop."""

    def register(self, thread: ThreadState) -> int:
        """Make a thread known that runs tasks; return its slot in the statistics."""

    def run_coroutine(self, task: TaskRecord, coroutine: Any, slot: int) -> None:
        """Continue a task whose callable returned a coroutine."""

    def watch(self, task: TaskRecord, thread: ThreadState | None) -> None:
        """End a task when its timeout has passed."""

    def keep_failure(self, task: TaskRecord) -> None:
        """Add a task to the failed ones; the statistics' lock is held."""

    def report_failure(self, task: TaskRecord, error: BaseException) -> None:
        """Call the error callback."""

    def cancel(self, task: TaskRecord) -> bool:
        """End a task before it begins, or a coroutine; False when it is too late."""

    def interrupt(self, task: TaskRecord) -> None:
        """Cancel a coroutine that has timed out."""

    def next_queued(self) -> list[TaskRecord]:
        """Return the first task of each queue."""

    def count_unfinished(self, exempt: set[TaskRecord]) -> int:
        """Count the other tasks that have not ended, or whose error callback has not returned."""

    def add_waker(self, waker: Waker) -> None:
        """Wake a thread when a task is submitted that no worker is free for."""

    def remove_waker(self, waker: Waker) -> None:
        """Undo `add_waker`."""
