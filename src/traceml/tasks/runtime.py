"""The Runtime: tasks submitted to threads and to an event loop, waited for, and counted."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Coroutine
from contextvars import copy_context
from time import perf_counter
from types import BuiltinFunctionType, FunctionType, MethodWrapperType, TracebackType
from typing import Any, Self, TypeVar, overload

from traceml.errors import NotCallableError, TaskError, TasksFailedError, UsageError
from traceml.tasks import lives
from traceml.tasks.engine import Engine, ErrorCallback
from traceml.tasks.handle import TaskHandle
from traceml.tasks.names import is_coroutine
from traceml.tasks.progress import progress, snapshot
from traceml.tasks.states import QUEUED
from traceml.tasks.waiting import wait_for_all

__all__ = ["Runtime"]

T = TypeVar("T")

_new = object.__new__
_ASYNC = 0x80  # inspect.CO_COROUTINE; importing inspect costs more than the rest of this module
_SYNC_KINDS = frozenset({BuiltinFunctionType, MethodWrapperType})
_NAMED = 3  # failures that stand in the text of an error; all are in its `exceptions`


class Runtime:
    """Runs callables on two pools of threads, and coroutine functions on an event loop of its own.

    Args:
        threads: workers for computation; 0: one per CPU that this process may use.
        io_threads: workers for tasks submitted with `io=True`, which mostly wait; 0: sized by the host.
        timeout: seconds that a task may run where `submit` says nothing else; None: without limit.
        stall_after: seconds on one line, without a report of progress, after which the log names a task and its line;
            None: never.

    Raises:
        UsageError: a size or a time is negative, or no number.
    """

    def __init__(
        self, threads: int = 0, io_threads: int = 0, *, timeout: float | None = None, stall_after: float | None = 60.0
    ) -> None:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.threads = _size("threads", threads) or cpus
        self.io_threads = _size("io_threads", io_threads) or min(32, cpus + 4)
        self._timeout_s = None if timeout is None else _seconds("timeout", timeout)
        stall_s = None if stall_after is None else _seconds("stall_after", stall_after)
        self._engine = Engine(self.threads, self.io_threads, stall_s)
        lives.add(self._engine)

    @overload
    def submit(
        self,
        fn: Callable[..., Coroutine[Any, Any, T]],
        /,
        *args: Any,
        name: str | None = None,
        timeout: float | None = None,
        io: bool = False,
        **kwargs: Any,
    ) -> TaskHandle[T]: ...

    @overload
    def submit(
        self,
        fn: Callable[..., T],
        /,
        *args: Any,
        name: str | None = None,
        timeout: float | None = None,
        io: bool = False,
        **kwargs: Any,
    ) -> TaskHandle[T]: ...

    def submit(
        self,
        fn: Callable[..., Any],
        /,
        *args: Any,
        name: str | None = None,
        timeout: float | None = None,
        io: bool = False,
        **kwargs: Any,
    ) -> TaskHandle[Any]:
        """Have a callable run, or a coroutine function awaited; returns at once.

        Args:
            fn: what to call; it runs in a copy of this context (`contextvars`).
            args: its arguments; a handle among them is passed on as it is.
            name: what to call the task; the callable's name when None.
            timeout: seconds that it may run, from its start.
            io: whether it mostly waits: it goes to the I/O pool.
            kwargs: its keyword arguments.

        Raises:
            NotCallableError: `fn` cannot be called.
            UsageError: the timeout is no positive number.
            RuntimeClosedError: this Runtime is shut down.
            TaskError: the system gives no thread to run it.
        """
        engine, kind = self._engine, type(fn)
        if kind is FunctionType:
            awaited = fn.__code__.co_flags & _ASYNC
        else:
            awaited = 0 if kind in _SYNC_KINDS else is_coroutine(fn)

        timeout = self._timeout_s if timeout is None else _seconds("timeout", timeout)
        handle: TaskHandle[Any] = _new(TaskHandle)
        handle._fn = fn
        handle._args = args
        handle._kwargs = kwargs or None
        handle._context = copy_context()
        handle._engine = engine
        handle._name = name
        handle._timeout_s = timeout
        handle._state = QUEUED
        handle._outcome = handle._progress = handle._waiters = None
        engine.count_submission()
        handle._submitted_s = perf_counter()
        try:
            if awaited:
                handle._ticket = []
                engine.loop.submit(handle)
                return handle

            handle._ticket = ticket = [handle]
            pool = engine.io if io else engine.compute
            pool.queue.append(ticket)
            if pool.parked:
                pool.wake()
        except RuntimeError as error:
            engine.give_up(handle)
            raise TaskError(f"task {handle.name!r} cannot be run, as no thread can be started: {error}") from error

        return handle

    def wait_all(self, raise_on_error: bool = False, timeout: float | None = None) -> None:
        """Wait until all tasks have ended, also those that tasks submit meanwhile.

        Inside a task it leaves out that task, and those that wait for it.

        Args:
            raise_on_error: whether failed tasks are an error.
            timeout: seconds to wait.

        Raises:
            TasksFailedError: tasks failed or timed out, since the beginning or the last `clear_failed`.
            WaitTimeoutError: there are unfinished tasks after `timeout` seconds.
        """
        wait_for_all(self._engine, timeout)
        if raise_on_error and (failed := self.get_failed()):
            _raise_all(failed)

    def get_failed(self) -> list[TaskHandle[Any]]:
        """Return the handles of the tasks that failed or timed out, in that order, since the last `clear_failed`."""
        return self._engine.ledger.failures.copy()

    def clear_failed(self) -> None:
        """Forget the failures: their handles, exceptions and tracebacks."""
        self._engine.ledger.failures.clear()

    def set_error_callback(self, callback: ErrorCallback | None) -> None:
        """Have `callback(handle, exception)` called when a task has failed or timed out; None: nothing.

        It is called after the task is done, on the thread that it ended on; `wait_all` waits for it too. What it raises
        is logged, and listed under `errors` in `get_progress()`.

        Raises:
            NotCallableError: it cannot be called.
        """
        if callback is not None and not callable(callback):
            raise NotCallableError(
                f"set_error_callback() takes a callable or None, not {type(callback).__name__} {callback!r:.80}"
            )

        self._engine.error_callback = callback

    def get_progress(self, *, tasks: bool = True) -> dict[str, Any]:
        """Return how many tasks are where, at one moment, and what the workers do.

        Args:
            tasks: whether to list the running tasks and those that ended last (1,000 at most).
        """
        return snapshot(self._engine, details=tasks)

    @staticmethod
    def progress(pct: float) -> None:
        """Report how far the task is that calls this, from 0 to 100."""
        progress(pct)

    def show(self) -> None:
        """Draw the progress on the terminal until all tasks have ended; without a terminal, only wait."""
        from traceml.tasks.show import showing

        with showing(self):
            self.wait_all()

    def shutdown(self, wait: bool = True, *, cancel: bool = False) -> None:
        """Take no more tasks, and end the threads.

        Args:
            wait: whether to wait for the tasks that there are, and for those that they submit. Else they end in the
                background, and submit none.
            cancel: whether to cancel what has not begun, and coroutines.
        """
        engine = self._engine
        engine.begin_closing()
        if cancel:
            engine.cancel_queued()

        if wait and not engine.closed:
            wait_for_all(engine, None)

        engine.close(wait=wait)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, Exception):
            self.shutdown()
        else:  # Ctrl-C, or an exit: nothing begins any more, and nobody wants to wait
            self.shutdown(wait=False, cancel=True)

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None and not engine.closed:
            engine.close(wait=False)

    def __repr__(self) -> str:
        return f"<Runtime threads={self.threads} io_threads={self.io_threads}>"


def _size(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UsageError(f"{name}={value!r}: it takes a whole number of threads, or 0 for as many as suit the host")

    return value


def _seconds(name: str, value: float) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0 or math.isinf(value):
        raise UsageError(f"{name}={value!r}: it takes a positive number of seconds, or None for no limit")

    return float(value)


def _raise_all(failed: list[TaskHandle[Any]]) -> None:
    errors = []
    for handle in failed:
        error, trace = handle._outcome
        if not isinstance(error, Exception):  # somebody wanted the program to end
            raise error.with_traceback(trace)

        errors.append(error.with_traceback(trace))

    told = [f"{handle.name}: {type(error).__name__}: {error}" for handle, error in zip(failed, errors, strict=True)]
    more = [f"and {len(told) - _NAMED} more"] if len(told) > _NAMED else []
    raise TasksFailedError(f"{len(failed)} task(s) failed: {'; '.join(told[:_NAMED] + more)}", errors)
