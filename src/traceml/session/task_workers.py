"""Processes that are given tasks: workers of `multiprocessing.Pool` and of Ray.

Both are ended by a signal while they wait for another task, and run no exit handlers then. That is no loss.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from traceml.recorder.lifecycle import note_idle

__all__ = ["watch_pool_worker", "watch_ray_worker"]

_POOLS = ("multiprocessing.pool", "torch.multiprocessing.pool")
_RAY_IDLE = "ray::IDLE"


def watch_pool_worker(target: Callable[..., object], args: Sequence[Any]) -> None:
    """Record when this process waits for a task, if it is a worker of a pool.

    Args:
        target, args: the function of this process and its arguments: of a worker, the queues of its tasks and of their
            results come first.
    """
    tasks: Any
    results: Any
    tasks, results = args[:2] if len(args) > 1 else (None, None)
    if getattr(target, "__module__", "") not in _POOLS or not (hasattr(tasks, "get") and hasattr(results, "put")):
        return

    get, put = tasks.get, results.put

    def get_task() -> object:
        note_idle(idle=True)
        task = get()
        note_idle(idle=task is None)  # the last one: the worker ends
        return task

    def put_result(result: object) -> None:
        note_idle(idle=True)  # the pool may end this worker as soon as it has the result
        put(result)

    tasks.get, results.put = get_task, put_result


def watch_ray_worker() -> None:
    """Record when this process waits for a task, if it is a worker of Ray, which names its processes accordingly."""
    ray, library = (sys.modules.get(name) for name in ("ray._private.worker", "ray._raylet"))
    worker: Any = getattr(ray, "global_worker", None)
    if worker is None or worker.mode != getattr(ray, "WORKER_MODE", None):
        return

    native: Any = library
    name_process = native.setproctitle
    if getattr(name_process, "_traceml_watches", False):
        return

    def setproctitle(title: str) -> None:
        name_process(title)
        # An actor is named by its class while it waits, by its method while it has a task.
        idle = title == _RAY_IDLE or (not worker.actor_id.is_nil() and "." not in title)
        note_idle(idle=idle)

    setproctitle._traceml_watches = True  # type: ignore[attr-defined]
    native.setproctitle = setproctitle
