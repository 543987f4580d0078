"""Execution of one task: on a worker, in place of a wait, or on the event loop."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from time import perf_counter
from types import CoroutineType, TracebackType
from typing import Any

from traceml.errors import TaskCancelledError, TaskTimeoutError
from traceml.tasks.callables import name_of, shorten
from traceml.tasks.task_record import (
    CANCELLED,
    COMPLETED,
    FAILED,
    FINAL,
    RUNNING,
    TIMED_OUT,
    TaskRecord,
    ThreadState,
)
from traceml.tasks.task_statistics import EndedTask
from traceml.tasks.waker import idle_waiters

__all__ = ["WorkerReplaced", "cancel", "expire", "fail", "finish", "run", "run_claimed"]

_log = logging.getLogger("traceml")


class WorkerReplaced(Exception):  # noqa: N818 - a signal to the worker, not an error
    """The task has returned after its timeout, when another thread had replaced this one."""


def run(
    task: TaskRecord,
    thread: ThreadState,
    counts: list[int],
    slot: int,
    now: float,
    record: Callable[[EndedTask], None],
) -> float:
    """Run a task that was taken from its entry.

    Args:
        task: the task.
        thread: the state of this thread.
        counts: the counters of the statistics.
        slot: the index of this thread in them.
        now: the time, `perf_counter` in seconds: a worker's task begins when its last one ended.
        record: takes the record of the ended task.

    Returns:
        the time at its end.
    """
    thread.current = task
    task.started_s = now
    task.state = RUNNING
    counts[slot] += 1
    if task.timeout_s is not None:
        return _run_timed(task, thread, slot)

    fn = task.fn
    try:
        if task.kwargs is None:
            result = task.context.run(fn, *task.args)  # type: ignore[union-attr, arg-type]
        else:
            result = task.context.run(fn, *task.args, **task.kwargs)  # type: ignore[union-attr, arg-type]
    except BaseException as error:  # noqa: BLE001 - any error is the task's, and raised where it is waited for
        return fail(task, slot, error)

    if type(result) is CoroutineType:
        return task.engine.run_coroutine(task, result, slot)

    name = task.given_name
    if name is None:
        try:
            name = str(fn.__qualname__)  # type: ignore[union-attr]
            task.given_name = name = shorten(name) if "<locals>" in name else name
        except Exception:  # noqa: BLE001 - a callable object may raise or return anything here
            task.given_name = name = name_of(fn)

    task.fn = task.args = task.kwargs = task.context = None  # type: ignore[assignment]
    task.outcome = result
    now = perf_counter()
    task.state = COMPLETED
    counts[slot + 1] += 1
    record((name, COMPLETED, task.submitted_s, task.started_s, now, task.last_progress))
    if task.callbacks is not None:
        _call_back(task)

    return now


def run_claimed(task: TaskRecord, thread: ThreadState) -> None:
    """Run a claimed task on a thread that is not a worker of its pool."""
    statistics, slot = task.engine.statistics, task.engine.register(thread)
    run(task, thread, statistics.counts, slot, perf_counter(), statistics.records.append)


def _run_timed(task: TaskRecord, thread: ThreadState, slot: int) -> float:
    """Run a task that the watchdog may end before it returns."""
    task.engine.watch(task, thread)
    try:
        result = task.context.run(task.fn, *task.args, **(task.kwargs or {}))  # type: ignore
    except BaseException as error:  # noqa: BLE001 - as in `run`
        now = fail(task, slot, error)
    else:
        if type(result) is CoroutineType:
            return task.engine.run_coroutine(task, result, slot)

        now = finish(task, slot, result)

    if thread.replaced:
        raise WorkerReplaced

    return now


def finish(task: TaskRecord, slot: int, result: Any) -> float:
    """End a task with its result, unless it has timed out."""
    _derive_name(task)
    statistics = task.engine.statistics
    with statistics.lock:
        if returned := task.state is TIMED_OUT:
            statistics.count_returned(slot)
        else:
            task.settle(COMPLETED, result)
            statistics.counts[slot + 1] += 1

    return _after_timeout() if returned else _publish(task)


def fail(task: TaskRecord, slot: int, error: BaseException) -> float:
    """End a task with its error, unless it has timed out."""
    _derive_name(task)
    statistics = task.engine.statistics
    with statistics.lock:
        if returned := task.state is TIMED_OUT:
            statistics.count_returned(slot)
        else:
            task.settle(FAILED, (error, _users_part(error.__traceback__)))
            statistics.count_failed(slot)
            task.engine.keep_failure(task)

    if returned:
        return _after_timeout()

    now = _publish(task)
    task.engine.report_failure(task, error)
    return now


def cancel(task: TaskRecord, slot: int | None = None) -> None:
    """End a task that was cancelled: before it began (no slot), or in an `await`."""
    kind = "task" if slot is None else "coroutine"
    reason = TaskCancelledError(f"{kind} {_derive_name(task)!r} was cancelled")
    statistics = task.engine.statistics
    with statistics.lock:
        if task.state is TIMED_OUT and slot is not None:
            statistics.count_returned(slot)
            return

        if task.state in FINAL:
            return

        if slot is None:
            task.started_s = perf_counter()

        task.settle(CANCELLED, (reason, None))
        statistics.count_cancelled(slot)

    _publish(task)


def expire(task: TaskRecord, thread: ThreadState | None, location: str) -> bool:
    """End a task whose time is over; False when it ended in time.

    Args:
        task: the task.
        thread: the thread that it blocks; None for a coroutine.
        location: the line that it is on, for the error's text.
    """
    statistics = task.engine.statistics
    error = TaskTimeoutError(
        f"task {_derive_name(task)!r} ran longer than its timeout of {task.timeout_s:g} s{location}"
    )
    with statistics.lock:
        if task.state is not RUNNING:
            return False

        if thread is not None:
            thread.replaced = True

        task.settle(TIMED_OUT, (error, None))
        statistics.count_timed_out()
        task.engine.keep_failure(task)

    _publish(task)
    report = task.engine.report_failure
    threading.Thread(target=report, args=(task, error), name="traceml-report", daemon=True).start()
    return True


def _derive_name(task: TaskRecord) -> str:
    """Derive the name before the call is dropped, and outside the lock: this may run the callable's own code."""
    return task.name


def _after_timeout() -> float:
    idle_waiters.wake_all()
    return perf_counter()


def _publish(task: TaskRecord) -> float:
    """Record the end of a task and wake the threads that wait for it."""
    now = perf_counter()
    ended = (task.name, task.state, task.submitted_s, task.started_s, now, task.last_progress)
    task.engine.statistics.records.append(ended)
    _call_back(task)
    idle_waiters.wake_all()
    return now


def _call_back(task: TaskRecord) -> None:
    callbacks, task.callbacks = task.callbacks, None
    for call in callbacks or ():
        try:
            call()
        except RuntimeError as error:  # the event loop that awaited it is closed
            _log.debug("no event loop is left that awaits task %r: %s", task.name, error)


def _users_part(trace: TracebackType | None) -> TracebackType | None:
    """Drop our own frames: they explain nothing, and would keep the task alive."""
    while trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("traceml.tasks."):
        trace = trace.tb_next

    return trace
