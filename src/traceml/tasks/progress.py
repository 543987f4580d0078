"""What `get_progress()` tells, and how a task reports its own progress."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

from traceml.errors import TaskError, UsageError
from traceml.tasks.ledger import RECORDS
from traceml.tasks.seats import current_task
from traceml.tasks.states import COMPLETED

if TYPE_CHECKING:
    from traceml.tasks.engine import Engine
    from traceml.tasks.ledger import Record
    from traceml.tasks.pool import Pool
    from traceml.tasks.seats import Seat

__all__ = ["progress", "snapshot"]


def progress(pct: float) -> None:
    """Report how far the task is that calls this.

    Args:
        pct: from 0 to 100.

    Raises:
        UsageError: it is not in that range.
        TaskError: no task of a Runtime calls this.
    """
    try:
        known = 0 <= pct <= 100
    except TypeError:
        known = False

    if not known:
        raise UsageError(f"progress({pct!r}): it takes per cent, from 0 to 100")

    task = current_task()
    if task is None:
        raise TaskError("progress() was called outside of a task; call it in a function that a Runtime runs")

    task._progress = float(pct)


def snapshot(engine: Engine, *, details: bool) -> dict[str, Any]:
    """Return the state of an engine; with `details` also its tasks, the running ones last."""
    ledger = engine.ledger
    tally = ledger.tally()
    failures = [(one.name, one.exception) for one in ledger.failures[-RECORDS:]]
    return {
        "total": tally.total,
        "completed": tally.completed,
        "running": tally.running,
        "queued": tally.queued,
        "failed": tally.failed,
        "cancelled": tally.cancelled,
        "timed_out": tally.timed_out,
        "workers": [worker for pool in engine.pools for worker in _workers(pool)],
        "tasks": _tasks(engine) if details else [],
        "errors": [
            *({"task": name, "error": f"{type(error).__name__}: {error}"} for name, error in failures),
            *({"task": name, "error": text} for name, text in list(ledger.complaints)),
        ],
        "stalled": [
            {
                "task": one.task,
                "seconds": one.since_s,
                "file": one.where.file,
                "line": one.where.line,
                "function": one.where.function,
            }
            for one in engine.watchdog.stalls()
        ],
    }


def _workers(pool: Pool) -> list[dict[str, Any]]:
    seats = {here.index: here for here in list(pool.workers.values()) if not here.replaced}
    return [_worker(pool, index, seats.get(index)) for index in range(pool.first, pool.first + pool.size)]


def _worker(pool: Pool, index: int, here: Seat | None) -> dict[str, Any]:
    task = here.current if here is not None else None
    if here is None or task is None or task.done():
        return {"id": index, "idle": True, "task": "", "queue_depth": 0, "pool": pool.name}

    aside = here.depth  # tasks that it has begun, and that wait on its stack for this one
    return {"id": index, "idle": False, "task": task.name, "queue_depth": aside, "pool": pool.name}


def _tasks(engine: Engine) -> list[dict[str, Any]]:
    now = perf_counter()
    running: list[Record] = [
        (one.name, one._state, one._submitted_s, one._started_s, now, one._progress) for one in engine.in_progress()
    ]
    return [
        {
            "name": name,
            "state": state,
            "execution_duration_ms": (ended - begun) * 1e3,
            "queued_duration_ms": (begun - submitted) * 1e3,
            "progress_pct": 100.0 if state is COMPLETED else pct or 0.0,
        }
        for name, state, submitted, begun, ended, pct in [*engine.ledger.records.copy(), *running][-RECORDS:]
    ]
