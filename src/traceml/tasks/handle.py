"""The handle of a submitted task: its name, its state and its result."""

from __future__ import annotations

from collections.abc import Generator
from types import TracebackType
from typing import Any, Generic, NoReturn, TypeVar, cast

from traceml.tasks.task_record import TaskRecord
from traceml.tasks.task_statistics import COMPLETED, FINAL
from traceml.tasks.waiting import await_for, wait_for

__all__ = ["TaskHandle"]

T = TypeVar("T")


class TaskHandle(TaskRecord, Generic[T]):
    """A submitted task, as `Runtime.submit` returns it.

    `name`, `task_id` (the number of the submission, from 0), `state` and the methods are for users; the other
    attributes belong to the engine. The handle is the record itself: a second object costs 48 B per pending task, and
    0.05 us.

    Examples:
        >>> with traceml.Runtime(threads=2) as runtime:
        ...     task = runtime.submit(pow, 2, 10, name="power")
        ...     print(task.get(), task.name, task.state)
        1024 power completed
    """

    __slots__ = ()

    def __init__(self) -> None:
        raise TypeError("a TaskHandle comes from Runtime.submit()")

    @property
    def exception(self) -> BaseException | None:
        """The error of the task; None while it has not ended, and when it completed."""
        if self.state in FINAL and self.state is not COMPLETED:
            return cast("BaseException", self.outcome[0])

        return None

    def get(self, timeout: float | None = None) -> T:
        """Wait for the task and return its result.

        Inside a task, a queued task of the same Runtime runs on this thread if no other is free for it.

        Args:
            timeout: seconds to wait; the task itself continues after them.

        Raises:
            ArgumentTypeError: `timeout` is no number.
            WaitTimeoutError: it has not ended within the time.
            TaskDeadlockError: it can only end after the task that is calling.
            BaseException: the error of the task.
        """
        if self.state not in FINAL:
            wait_for(self, timeout)

        if self.state is COMPLETED:
            return cast("T", self.outcome)

        try:
            return _reraise(*self.outcome)
        finally:
            del self  # this frame is in the traceback now, which must not keep itself alive

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the task, as `get` does; raise its error, return nothing."""
        self.get(timeout)

    def cancel(self) -> bool:
        """End the task before it begins, or a coroutine in its `await`.

        Returns:
            whether that was possible: False for a callable that has begun, and for a task that has ended.
        """
        return self.engine.cancel(self)

    def __await__(self) -> Generator[Any, None, T]:
        if self.state not in FINAL:
            yield from await_for(self).__await__()

        if self.state is COMPLETED:
            return cast("T", self.outcome)

        try:
            return _reraise(*self.outcome)
        finally:
            del self

    def __repr__(self) -> str:
        return f"<TaskHandle {self.name!r} {self.state}>"


def _reraise(error: BaseException, trace: TracebackType | None) -> NoReturn:
    try:
        raise error.with_traceback(trace)  # each `get` would make the task's own traceback longer otherwise
    finally:
        del error, trace
