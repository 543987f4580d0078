"""Execution of one task: on a worker, inline on a thread that waits, or on the event loop."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from time import perf_counter
from types import CoroutineType, TracebackType
from typing import Any

from traceml.errors import TaskCancelledError, TaskTimeoutError
from traceml.tasks.task_record import TaskRecord, ThreadState, awaiting_thread, name_of, shorten, wake_idle_waiters
from traceml.tasks.task_statistics import CANCELLED, COMPLETED, FAILED, FINAL, RUNNING, TIMED_OUT, EndedTask

__all__ = ["WorkerReplaced", "cancel", "end", "expire", "fail", "run", "run_claimed"]

_log = logging.getLogger("traceml")

OnEnd = Callable[[EndedTask], None]


class WorkerReplaced(Exception):  # noqa: N818 - a signal to the worker, not an error
    """The task has returned after its timeout, when another thread had replaced this one."""


def run(task: TaskRecord, thread: ThreadState, counts: list[int], slot: int, now: float, on_end: OnEnd) -> float:
    """Run a task that was taken from its entry; return the time at its end.

    Args:
        slot: the index of this thread in `counts`.
        now: the time, `perf_counter` in seconds: a worker's task begins when its last one ended.
        on_end: takes the record of the ended task.
    """
    thread.current = task
    if awaiting_thread:
        task.engine.compensate_waits()

    task.started_s, task.state = now, RUNNING
    counts[slot] += 1
    timed = task.timeout_s is not None
    if timed:
        task.engine.watch(task, thread)

    fn = task.fn
    try:
        if task.kwargs is None:
            result = task.context.run(fn, *task.args)  # type: ignore[union-attr, arg-type]
        else:
            result = task.context.run(fn, *task.args, **task.kwargs)  # type: ignore[union-attr, arg-type]
    except BaseException as error:  # noqa: BLE001 - any error is the task's, and raised where it is waited for
        fail(task, slot, error)
    else:
        if type(result) is CoroutineType:
            task.engine.run_coroutine(task, result, slot)
        elif timed:
            end(task, slot, COMPLETED, result)
        else:  # as `end` does, without its lock
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
            on_end((name, COMPLETED, task.submitted_s, task.started_s, now, task.last_progress))
            if task.callbacks is not None:
                _call_back(task)

            return now

    if timed and thread.replaced:
        raise WorkerReplaced

    return perf_counter()


def run_claimed(task: TaskRecord, thread: ThreadState) -> None:
    """Run a claimed task on a thread that is not a worker of its pool."""
    statistics, slot = task.engine.statistics, task.engine.register(thread)
    run(task, thread, statistics.counts, slot, perf_counter(), statistics.records.append)


def end(
    task: TaskRecord, slot: int | None, state: str, outcome: Any, blocked_thread: ThreadState | None = None
) -> bool:
    """End a task in a final state; False if it has timed out before.

    Args:
        slot: the slot of the thread that returned from it; None if none has.
        outcome: the result, or the error and its traceback.
        blocked_thread: the thread that another one will replace.
    """
    name = task.name  # outside the lock, as it may run the callable's own code, and before the call is dropped
    statistics = task.engine.statistics
    with statistics.lock:
        ends = task.state not in FINAL
        if ends:
            task.fn = task.args = task.kwargs = task.context = None  # type: ignore[assignment]
            task.outcome = outcome
            task.state = state
            statistics.count_end(state, slot)
            if state is FAILED or state is TIMED_OUT:
                task.engine.keep_failure(task)
            if blocked_thread is not None:
                blocked_thread.replaced = True
        elif slot is not None:
            statistics.count_returned(slot)

    if ends:
        statistics.records.append((name, state, task.submitted_s, task.started_s, perf_counter(), task.last_progress))
        _call_back(task)

    wake_idle_waiters()
    return ends


def fail(task: TaskRecord, slot: int, error: BaseException) -> None:
    """End a task with its error, unless it has timed out."""
    if end(task, slot, FAILED, (error, _users_part(error.__traceback__))):
        task.engine.report_failure(task, error)


def cancel(task: TaskRecord, slot: int | None = None) -> None:
    """End a task that was cancelled: before it began (no slot), or in an `await`."""
    kind = "coroutine"
    if slot is None:
        kind, task.started_s = "task", perf_counter()

    end(task, slot, CANCELLED, (TaskCancelledError(f"{kind} {task.name!r} was cancelled"), None))


def expire(task: TaskRecord, thread: ThreadState | None, location: str) -> bool:
    """End a task whose time is over; False when it ended in time.

    Args:
        thread: the thread that it blocks; None for a coroutine.
        location: the line that it is on, for the error's text.
    """
    error = TaskTimeoutError(f"task {task.name!r} ran longer than its timeout of {task.timeout_s:g} s{location}")
    if not end(task, None, TIMED_OUT, (error, None), thread):
        return False

    report = task.engine.report_failure
    try:
        threading.Thread(target=report, args=(task, error), name="traceml-report", daemon=True).start()
    except RuntimeError:  # the system gives no thread
        report(task, error)

    return True


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
