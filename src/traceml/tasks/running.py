"""How one task runs and ends: on a worker, in place of a wait, or beyond its time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from time import perf_counter
from types import CoroutineType, TracebackType
from typing import Any

from traceml.errors import TaskCancelledError, TaskTimeoutError
from traceml.tasks.handle import TaskHandle
from traceml.tasks.ledger import Record
from traceml.tasks.names import name_of, shorten
from traceml.tasks.seats import Seat, seat
from traceml.tasks.states import CANCELLED, COMPLETED, FAILED, FINAL, RUNNING, TIMED_OUT

__all__ = ["Retire", "cancelled", "expire", "fail", "finish", "run"]

_log = logging.getLogger("traceml")


class Retire(Exception):  # noqa: N818 - it tells a worker to end, and is no error
    """A worker's task came back after its time, when another had taken the worker's place."""


def run(
    handle: TaskHandle[Any],
    here: Seat,
    counts: list[int],
    slot: int,
    now: float,
    record: Callable[[Record], None],
) -> float:
    """Run a task that was taken from its ticket.

    Args:
        handle: the task.
        here: the seat of this thread.
        counts: the ledger's counters.
        slot: where this thread counts in them.
        now: the time, `perf_counter` in seconds: a worker's task begins when its last one ended.
        record: takes what is remembered of the task.

    Returns:
        the time at its end.
    """
    here.current = handle
    handle._started_s = now
    handle._state = RUNNING
    counts[slot] += 1
    if handle._timeout_s is not None:
        return _run_timed(handle, here, slot)

    fn = handle._fn
    try:
        if handle._kwargs is None:
            result = handle._context.run(fn, *handle._args)  # type: ignore[union-attr, arg-type]
        else:
            result = handle._context.run(fn, *handle._args, **handle._kwargs)  # type: ignore[union-attr, arg-type]
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is the task's, and raised where it is waited for
        return fail(handle, slot, error)

    if type(result) is CoroutineType:
        return handle._engine.loop.adopt(handle, result, slot)

    name = handle._name
    if name is None:
        try:
            name = str(fn.__qualname__)  # type: ignore[union-attr]
            handle._name = name = shorten(name) if "<locals>" in name else name
        except Exception:  # noqa: BLE001 - an object that is called may answer anything, or nothing
            handle._name = name = name_of(fn)

    handle._fn = handle._args = handle._kwargs = handle._context = None  # type: ignore[assignment]
    handle._outcome = result
    now = perf_counter()
    handle._state = COMPLETED
    counts[slot + 1] += 1
    record((name, COMPLETED, handle._submitted_s, handle._started_s, now, handle._progress))
    if handle._waiters is not None:
        _wake(handle)

    return now


def _run_timed(handle: TaskHandle[Any], here: Seat, slot: int) -> float:
    """Run a task that the watchdog may end before it returns."""
    engine = handle._engine
    engine.watchdog.watch(handle, here)
    try:
        result = handle._context.run(handle._fn, *handle._args, **(handle._kwargs or {}))  # type: ignore
    except BaseException as error:  # noqa: BLE001 - as in `run`
        now = fail(handle, slot, error)
    else:
        if type(result) is CoroutineType:
            return engine.loop.adopt(handle, result, slot)

        now = finish(handle, slot, result)

    if here.replaced:
        raise Retire

    return now


def finish(handle: TaskHandle[Any], slot: int, result: Any) -> float:
    """End a task with its result, unless its time was over before."""
    _named(handle)
    ledger = handle._engine.ledger
    with ledger.lock:
        if handle._state is TIMED_OUT:
            ledger.count_returned(slot)
            return _late(handle)

        _settle(handle, COMPLETED, result)
        ledger.counts[slot + 1] += 1

    return _publish(handle)


def fail(handle: TaskHandle[Any], slot: int, error: BaseException) -> float:
    """End a task with what it raised, unless its time was over before."""
    _named(handle)
    ledger = handle._engine.ledger
    with ledger.lock:
        if handle._state is TIMED_OUT:
            ledger.count_returned(slot)
            return _late(handle)

        _settle(handle, FAILED, (error, _users_part(error.__traceback__)))
        ledger.count_failed(handle, slot)

    now = _publish(handle)
    _report(handle, error)
    return now


def cancelled(handle: TaskHandle[Any], slot: int | None, error: BaseException | None = None) -> None:
    """End a task that was cancelled: before it began (no slot), or where it awaited."""
    reason = error or TaskCancelledError(f"task {_named(handle)!r} was cancelled")
    ledger = handle._engine.ledger
    with ledger.lock:
        if handle._state is TIMED_OUT and slot is not None:
            ledger.count_returned(slot)
            return

        if handle._state in FINAL:
            return

        if slot is None:
            handle._started_s = perf_counter()

        _settle(handle, CANCELLED, (reason, None))
        ledger.count_cancelled(slot)

    _publish(handle)


def expire(handle: TaskHandle[Any], here: Seat | None, where: str) -> bool:
    """End a task whose time is over, wherever it is; False when it ended in time.

    Args:
        handle: the task.
        here: the worker that is stuck in it, None where no worker is.
        where: the line that it is on, for the error's text.
    """
    ledger = handle._engine.ledger
    error = TaskTimeoutError(f"task {_named(handle)!r} ran longer than its timeout of {handle._timeout_s:g} s{where}")
    with ledger.lock:
        if handle._state is not RUNNING:
            return False

        if here is not None:
            here.replaced = True

        _settle(handle, TIMED_OUT, (error, None))
        ledger.count_timed_out(handle)

    _publish(handle)
    threading.Thread(target=_report, args=(handle, error), name="traceml-report", daemon=True).start()
    return True


def _named(handle: TaskHandle[Any]) -> str:
    """Derive the name while there is a callable, and outside the lock: a callable may have code that does it."""
    return handle.name


def _settle(handle: TaskHandle[Any], state: str, outcome: Any) -> None:
    handle._fn = handle._args = handle._kwargs = handle._context = None  # type: ignore[assignment]
    handle._outcome = outcome
    handle._state = state


def _late(handle: TaskHandle[Any]) -> float:
    handle._engine.ledger.wake_sleepers()
    return perf_counter()


def _publish(handle: TaskHandle[Any]) -> float:
    """Remember an end, and tell those who wait for it."""
    now = perf_counter()
    ledger = handle._engine.ledger
    ledger.records.append((handle.name, handle._state, handle._submitted_s, handle._started_s, now, handle._progress))
    _wake(handle)
    ledger.wake_sleepers()
    return now


def _wake(handle: TaskHandle[Any]) -> None:
    waiters, handle._waiters = handle._waiters, None
    for call in waiters or ():
        try:
            call()
        except RuntimeError as error:  # the event loop of one who awaited is closed
            _log.debug("nobody is left to be told of task %r: %s", handle.name, error)


def _report(handle: TaskHandle[Any], error: BaseException) -> None:
    """Call the error callback; what it raises is logged and kept for `get_progress()`."""
    ledger, callback = handle._engine.ledger, handle._engine.error_callback
    here = seat()
    before, here.current = here.current, handle
    try:
        if callback is not None:
            callback(handle, error)
    except BaseException as failure:  # noqa: BLE001 - a callback's error is reported, and ends no worker
        _log.exception("the error callback failed for task %r", handle.name)
        ledger.complaints.append((handle.name, f"error callback: {type(failure).__name__}: {failure}"))
    finally:
        here.current = before
        ledger.reporting.discard(handle)
        ledger.wake_sleepers()


def _users_part(trace: TracebackType | None) -> TracebackType | None:
    """Leave our own frames out: they say nothing, and would keep the handle alive."""
    while trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("traceml.tasks."):
        trace = trace.tb_next

    return trace
