"""The handle of a task: its name, its state, and the way to its result."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextvars import Context
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar, cast

from traceml.tasks.names import name_of
from traceml.tasks.states import COMPLETED, FINAL

if TYPE_CHECKING:
    from traceml.tasks.engine import Engine

__all__ = ["TaskHandle"]

T = TypeVar("T")


class TaskHandle(Generic[T]):
    """A task that was submitted; `Runtime.submit` makes it.

    The queue holds the ticket, a list with the handle in it. Whoever takes the handle out runs the task: taking is one
    atomic operation, and what is left in the queue keeps no result alive.
    """

    __slots__ = (
        "__weakref__",
        "_args",
        "_context",
        "_engine",
        "_fn",
        "_kwargs",
        "_name",
        "_outcome",
        "_progress",
        "_started_s",
        "_state",
        "_submitted_s",
        "_ticket",
        "_timeout_s",
        "_waiters",
    )

    _args: tuple[Any, ...]
    _context: Context | None
    _engine: Engine
    _fn: Callable[..., Any] | None
    _kwargs: Mapping[str, Any] | None
    _name: str | None
    _outcome: Any  # the result; (exception, its traceback) when there is none
    _progress: float | None
    _started_s: float
    _state: str
    _submitted_s: float
    _ticket: list[TaskHandle[Any]]
    _timeout_s: float | None
    _waiters: list[Callable[[], object]] | None

    def __init__(self) -> None:
        raise TypeError("a TaskHandle comes from Runtime.submit()")

    @property
    def name(self) -> str:
        """The name that was given, or the callable's."""
        fn, name = self._fn, self._name  # in this order: the name is set before the callable is dropped
        if name is None:
            name = self._name = name_of(fn)

        return name

    @property
    def state(self) -> str:
        """`queued`, `running`, `completed`, `failed`, `cancelled` or `timed_out`."""
        return self._state

    @property
    def exception(self) -> BaseException | None:
        """What the task raised; None while it has not ended, and when it completed."""
        if self._state in FINAL and self._state is not COMPLETED:
            return cast("BaseException", self._outcome[0])

        return None

    def done(self) -> bool:
        """Whether the task has ended, in whatever way."""
        return self._state in FINAL

    def get(self, timeout: float | None = None) -> T:
        """Wait for the task and return its result; a task that is still queued runs here and now.

        Args:
            timeout: seconds to wait; then the task is left to the pool.

        Raises:
            WaitTimeoutError: it has not ended within the time.
            TaskDeadlockError: it can only end after the task that is calling.
            BaseException: whatever the task raised.
        """
        if self._state not in FINAL:
            from traceml.tasks.waiting import wait_for

            wait_for(self, timeout)

        if self._state is COMPLETED:
            return cast("T", self._outcome)

        try:
            return _reraise(*self._outcome)
        finally:
            del self  # this frame is in the traceback now, which must not keep itself alive

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the task, as `get` does; raises its error, returns nothing."""
        self.get(timeout)

    def cancel(self) -> bool:
        """End the task before it begins, or a coroutine where it awaits.

        Returns:
            whether that was possible: False for a callable that runs already, and for what has ended.
        """
        return self._engine.cancel(self)

    def __await__(self) -> Generator[Any, None, T]:
        if self._state not in FINAL:
            from traceml.tasks.waiting import await_for

            yield from await_for(self).__await__()

        if self._state is COMPLETED:
            return cast("T", self._outcome)

        try:
            return _reraise(*self._outcome)
        finally:
            del self

    def __repr__(self) -> str:
        return f"<TaskHandle {self.name!r} {self._state}>"


def _reraise(error: BaseException, trace: TracebackType | None) -> NoReturn:
    try:
        raise error.with_traceback(trace)  # as the task left it: each `get` would lengthen it otherwise
    finally:
        del error, trace
