"""The Runtime: submit tasks to threads and to an event loop, wait for them and count them."""

from __future__ import annotations

import inspect
import math
import operator
import os
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import copy_context
from time import perf_counter
from types import BuiltinFunctionType, FunctionType, MethodWrapperType, TracebackType
from typing import Any, Self, TypeVar, cast, overload

from traceml.coerce import seconds_to_wait
from traceml.errors import (
    ArgumentTypeError,
    NotCallableError,
    RuntimeClosedError,
    TaskError,
    TasksFailedError,
    UsageError,
)
from traceml.formatting import error_text
from traceml.tasks.engine import Engine
from traceml.tasks.handle import TaskHandle
from traceml.tasks.progress import progress, showing, snapshot
from traceml.tasks.task_record import TaskRecord, is_coroutine
from traceml.tasks.task_statistics import QUEUED
from traceml.tasks.waiting import wait_for_all

__all__ = ["Runtime", "get_default_runtime", "has_default_runtime", "set_default_runtime"]

T = TypeVar("T")
ErrorCallback = Callable[[TaskHandle[Any], BaseException], object]

_new = object.__new__
_ASYNC = inspect.CO_COROUTINE
_SYNC_KINDS = frozenset({BuiltinFunctionType, MethodWrapperType})
_MAX_THREADS = 1 << 22  # Linux numbers no more; a larger pool would only take memory
_NAMED = 3  # failures in the text of an error; all are in its `exceptions`


class Runtime:
    """Runs callables on two pools of threads, and coroutine functions on an event loop of its own.

    Examples:
        >>> with traceml.Runtime(threads=4) as runtime:
        ...     length = runtime.submit(len, "abc").get()

    Args:
        threads: workers for computation; 0: one per CPU that this process may use.
        io_threads: workers for tasks submitted with `io=True`, which mostly wait; 0: sized by the host.
        timeout: seconds that a task may run unless `submit` sets another limit; None: without limit.
        stall_after: seconds on one line, without a report of progress, after which a warning names a task and its line;
            None: never.

    Raises:
        UsageError: a size or a time is negative, or not a number.
    """

    def __init__(
        self, threads: int = 0, io_threads: int = 0, *, timeout: float | None = None, stall_after: float | None = 60.0
    ) -> None:
        cpus = len(os.sched_getaffinity(0))
        self.threads = _size("threads", threads) or cpus
        self.io_threads = _size("io_threads", io_threads) or min(32, cpus + 4)
        self._timeout_s = None if timeout is None else _seconds("timeout", timeout)
        stall_s = None if stall_after is None else _seconds("stall_after", stall_after)
        self._engine = Engine(self.threads, self.io_threads, stall_s)

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
        """Run a callable on a thread, or a coroutine function on the event loop; return at once.

        Args:
            fn: the callable; it runs in a copy of this context (`contextvars`).
            args: its arguments; a handle among them is passed on as it is.
            name: the name of the task; None: the callable's name.
            timeout: seconds that it may run, from its start.
            io: whether it mostly waits; it then runs in the I/O pool.
            kwargs: its keyword arguments.

        Raises:
            NotCallableError: `fn` cannot be called.
            UsageError: the timeout is not a positive number.
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
        handle.fn, handle.args = fn, args
        handle.kwargs, handle.context = kwargs or None, copy_context()
        handle.engine = engine
        handle.given_name = name
        handle.timeout_s = timeout
        handle.state = QUEUED
        handle.outcome = handle.last_progress = handle.callbacks = None
        handle.submitted_s = perf_counter()
        entry: list[TaskRecord] = [] if awaited else [handle]
        handle.entry = entry
        handle.pool = pool = None if awaited else engine.io if io else engine.compute
        try:
            handle.task_id = engine.count_submission()
            if pool is None:
                engine.loop.submit(handle)
            else:
                pool.queue.append(entry)
                if pool.parked:
                    pool.wake()
        except RuntimeClosedError:  # it was not counted
            raise
        except RuntimeError as error:
            engine.reject(handle)
            raise TaskError(f"task {handle.name!r} cannot be run, as no thread can be started: {error}") from error
        except BaseException:  # Ctrl-C
            engine.reject(handle)
            raise

        return handle

    def wait_all(self, raise_on_error: bool = False, timeout: float | None = None) -> None:
        """Wait until all tasks have ended, including tasks that they submit meanwhile.

        Inside a task, this excludes that task and the tasks that wait for it.

        Args:
            raise_on_error: whether to raise if tasks failed.
            timeout: seconds to wait.

        Raises:
            TasksFailedError: tasks failed or timed out, since the start or the last `clear_failed`. A task's SystemExit
                or KeyboardInterrupt is the cause of a TaskError among its `exceptions`.
            ArgumentTypeError: `timeout` is no number.
            WaitTimeoutError: there are unfinished tasks after `timeout` seconds.
        """
        wait_for_all(self._engine, timeout)
        if raise_on_error and (failed := self.get_failed()):
            _raise_all(failed)

    def get_failed(self) -> list[TaskHandle[Any]]:
        """Return the handles of the tasks that failed or timed out, in that order, since the last `clear_failed`."""
        return cast("list[TaskHandle[Any]]", self._engine.failures.copy())

    def clear_failed(self) -> None:
        """Forget the failures: their handles, exceptions and tracebacks."""
        self._engine.failures.clear()

    def set_error_callback(self, callback: ErrorCallback | None) -> None:
        """Call `callback(handle, exception)` after a task has failed or timed out; None: no callback.

        It runs on the thread that the task ended on, and `wait_all` waits for it, too. Its own errors are logged, and
        listed under `errors` in `get_progress()`.

        Raises:
            NotCallableError: it cannot be called.
        """
        if callback is not None and not callable(callback):
            raise NotCallableError(
                f"set_error_callback() takes a callable or None, not {type(callback).__name__} {callback!r:.80}"
            )

        self._engine.error_callback = callback

    def get_progress(self, *, tasks: bool = True) -> dict[str, Any]:
        """Return the number of tasks in each state, at one moment, and the task of each worker.

        Args:
            tasks: whether to list the running tasks and those that ended last (1,000 at most).
        """
        return snapshot(self._engine, details=tasks)

    def is_responsive(self) -> bool:
        """Whether a task that is submitted now would run.

        False after `shutdown()`, and while all threads of a pool, or the event loop, are held by tasks that have
        stalled (`stall_after`).
        """
        return self._engine.is_responsive()

    @staticmethod
    def progress(pct: float) -> None:
        """Report the progress of the calling task, from 0 to 100."""
        progress(pct)

    def show(self) -> None:
        """Show the progress on the terminal until all tasks have ended; without a terminal, only wait."""
        with showing(self.get_progress):
            self.wait_all()

    def shutdown(self, wait: bool = True, *, cancel: bool = False) -> None:
        """Accept no more tasks, and end the threads.

        Args:
            wait: whether to wait for the tasks, and for those that they submit. Otherwise they end in the background,
                and cannot submit any.
            cancel: whether to cancel coroutines, and tasks that have not begun.
        """
        engine = self._engine
        engine.begin_closing()
        if cancel:
            engine.cancel_queued()

        if wait and not engine.closed:
            wait_for_all(engine, None)

        engine.close(wait=wait)

    @property
    def closed(self) -> bool:
        """Whether it is shut down."""
        return self._engine.closed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, Exception):
            self.shutdown()
        else:  # Ctrl-C or an exit: start no task, and wait for none
            self.shutdown(wait=False, cancel=True)

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None and not engine.closed:
            engine.close(wait=False)

    def __repr__(self) -> str:
        return f"<Runtime threads={self.threads} io_threads={self.io_threads}>"


def _size(name: str, value: int) -> int:
    try:
        size = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        size = -1

    if not 0 <= size <= _MAX_THREADS:
        raise UsageError(
            f"{name}={value!r:.100}: it must be a whole number of threads up to {_MAX_THREADS:,}, "
            "or 0 for a number that suits the host"
        )

    return size


def _seconds(name: str, value: float) -> float | None:
    with suppress(ArgumentTypeError, UsageError):
        seconds = seconds_to_wait(value)
        if seconds is not None and seconds > 0:
            return None if seconds == math.inf else seconds

    raise UsageError(f"{name}={value!r:.100}: it must be a positive number of seconds, or None for no limit")


def _raise_all(failed: list[TaskHandle[Any]]) -> None:
    texts, errors = [], []
    for handle in failed:
        error, trace = handle.outcome
        texts.append(f"{handle.name}: {error_text(error)}")
        error = error.with_traceback(trace)
        if not isinstance(error, Exception):  # SystemExit or KeyboardInterrupt, which a group of errors cannot hold
            left = TaskError(f"task {handle.name!r} raised {error_text(error)}")
            left.__cause__ = error
            error = left

        errors.append(error)

    more = [f"and {len(texts) - _NAMED} more"] if len(texts) > _NAMED else []
    raise TasksFailedError(f"{len(failed)} task(s) failed: {'; '.join(texts[:_NAMED] + more)}", errors)


_default_lock = threading.RLock()
_default: Runtime | None = None


def get_default_runtime() -> Runtime:
    """Return the Runtime of this process; created at the first call, and again after it was shut down.

    Examples:
        >>> traceml.get_default_runtime().submit(len, "abc").get()
        3
    """
    with _default_lock:
        if _default is None or _default.closed:
            set_default_runtime(Runtime())

        assert _default is not None
        return _default


def set_default_runtime(runtime: Runtime | None) -> Runtime | None:
    """Set the Runtime of this process; None: the next call of `get_default_runtime` creates one.

    Examples:
        >>> before = traceml.set_default_runtime(traceml.Runtime(threads=2))
        >>> traceml.get_default_runtime().threads
        2
        >>> traceml.get_default_runtime().shutdown()

    Returns:
        the previous one; it is not shut down.

    Raises:
        ArgumentTypeError: it is not a Runtime.
    """
    global _default
    if runtime is not None and not isinstance(runtime, Runtime):
        raise ArgumentTypeError(f"set_default_runtime() takes a Runtime or None, not {type(runtime).__name__}")

    with _default_lock:
        before, _default = _default, runtime
        return before


def has_default_runtime() -> bool:
    """Whether the process has a default Runtime already."""
    return _default is not None


def _after_fork() -> None:
    global _default_lock
    _default_lock = threading.RLock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_after_fork)
