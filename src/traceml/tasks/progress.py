"""Progress of a Runtime: the content of `get_progress()`, reports from tasks, and the view on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any

from traceml.errors import TaskError, UsageError
from traceml.formatting import error_text, ms_text
from traceml.tasks.engine import Engine
from traceml.tasks.task_record import ThreadState, current_task
from traceml.tasks.task_statistics import COMPLETED, FINAL, RECORDS, EndedTask
from traceml.tasks.thread_pool import ThreadPool

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["progress", "showing", "snapshot", "view"]

_MAX_BARS = 8  # running tasks with a progress bar of their own
_BAR_WIDTH = 40


def progress(pct: float) -> None:
    """Report the progress of the calling task.

    Args:
        pct: from 0 to 100.

    Raises:
        UsageError: it is not in that range.
        TaskError: no task of a Runtime calls this.
    """
    try:
        valid = 0 <= pct <= 100
    except TypeError:
        valid = False

    if not valid:
        raise UsageError(f"progress() expects a percentage from 0 to 100, got {pct!r}")

    task = current_task()
    if task is None:
        raise TaskError("progress() was called outside of a task; call it in a function that a Runtime runs")

    task.last_progress = float(pct)


def snapshot(engine: Engine, *, details: bool) -> dict[str, Any]:
    """Return the state of an engine; with `details` also its tasks, the running ones last."""
    counts = engine.statistics.snapshot()
    failures = [(task.name, task.outcome[0]) for task in engine.failures[-RECORDS:]]
    return {
        **counts,
        "workers": _workers(engine.compute),
        "io_workers": _workers(engine.io),
        "tasks": _tasks(engine) if details else [],
        "errors": [
            *({"task": name, "error": error_text(error)} for name, error in failures),
            *({"task": name, "error": text} for name, text in list(engine.callback_errors)),
        ],
        "stalled": engine.watchdog.stalled(),
    }


def _workers(pool: ThreadPool) -> list[dict[str, Any]]:
    threads = {thread.index: thread for thread in list(pool.workers.values()) if not thread.replaced}
    return [_worker(pool, index, threads.get(index)) for index in range(pool.first, pool.first + pool.size)]


def _worker(pool: ThreadPool, index: int, thread: ThreadState | None) -> dict[str, Any]:
    task = thread.current if thread is not None else None
    if thread is None or task is None or task.state in FINAL:
        return {"id": index, "idle": True, "task": "", "queue_depth": 0, "pool": pool.name}

    waiting = thread.depth  # tasks that it has begun, and that wait on its stack for this one
    return {"id": index, "idle": False, "task": task.name, "queue_depth": waiting, "pool": pool.name}


def _tasks(engine: Engine) -> list[dict[str, Any]]:
    now = perf_counter()
    running: list[EndedTask] = [
        (task.name, task.state, task.submitted_s, task.started_s, now, task.last_progress)
        for task, _ in engine.running()
    ]
    return [
        {
            "name": name,
            "state": state,
            "execution_duration_ms": (ended - begun) * 1e3,
            "queued_duration_ms": (begun - submitted) * 1e3,
            "progress_pct": 100.0 if state is COMPLETED else pct or 0.0,
        }
        for name, state, submitted, begun, ended, pct in [*engine.statistics.records.copy(), *running][-RECORDS:]
    ]


@contextmanager
def showing(get_progress: Callable[[], dict[str, Any]], console: Console | None = None) -> Iterator[None]:
    """Show progress while a block runs, if there is a terminal.

    Args:
        get_progress: returns the progress, as `Runtime.get_progress` does.
        console: the terminal; None: standard error, as standard output belongs to the program.
    """
    from rich.console import Console
    from rich.live import Live

    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield
        return

    with Live(get_renderable=lambda: view(get_progress()), console=console, refresh_per_second=8):
        yield


def view(found: dict[str, Any]) -> RenderableType:
    """Render progress: one bar for all tasks, and one for each running task."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1))
    ended = found["total"] - found["running"] - found["queued"]
    bar = ProgressBar(total=max(1, found["total"]), completed=ended, width=_BAR_WIDTH)
    table.add_row(Text("all tasks", style="bold"), bar, Text(_summary(found, ended)))
    for task in [one for one in found["tasks"] if one["state"] == "running"][:_MAX_BARS]:
        pct = task["progress_pct"]
        line = ProgressBar(total=100, completed=pct, width=_BAR_WIDTH, pulse=pct == 0)
        table.add_row(Text(task["name"]), line, Text(ms_text(task["execution_duration_ms"])))

    return table


def _summary(found: dict[str, Any], ended: int) -> str:
    counts = [(found[state], state.replace("_", " ")) for state in ("running", "failed", "timed_out", "cancelled")]
    return ", ".join([f"{ended}/{found['total']}", *(f"{count} {word}" for count, word in counts if count)])
