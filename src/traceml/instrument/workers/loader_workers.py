"""Worker processes of the data loaders that are being read, the batch that the rank waits for, and workers that die.

torch's handler of SIGCHLD raises in the training process, which the script may catch. Once the script has ended, the
handler would interrupt the report of its end: then it does not raise. A worker that a fork server started is no child
of the training process: torch finds it dead when its batch is overdue.
"""

from __future__ import annotations

import logging
import multiprocessing
import re
import weakref
from collections import deque
from collections.abc import Iterator
from types import FrameType
from typing import Any, NamedTuple

from traceml.clock import monotonic_ns
from traceml.database.schema import Slot
from traceml.fail_open import fail_open
from traceml.inspection.kernel_state import uncollected_status
from traceml.inspection.thread_frames import stack_frames
from traceml.instrument.importlib_bootstrap import uncounted
from traceml.instrument.patches import Patches
from traceml.instrument.step_clock import StepClock

__all__ = [
    "LoaderWorker",
    "WorkersOfLoader",
    "awaited_loader",
    "follow_iterator",
    "watch_workers",
    "worker_pids",
    "workers_of_loaders",
]

_RECEIVING, _FILES = "_get_data", ("/dataloader.py", "/stateful_dataloader.py")
_MAX_DEPTH = 100

# One entry per iterator that a training loop reads, added when it is created.
_iterators: weakref.WeakSet[Any] = weakref.WeakSet()
# The last reference to an iterator ends its workers and waits for them, on the thread that drops it. So those who only
# need process ids do not touch it.
_pids: dict[weakref.ref[Any], WorkersOfLoader] = {}
_log = logging.getLogger("traceml")
_PID = re.compile(r"\(pid (\d+)\)")
_UNRECORDED = "the death of a loader worker is not recorded"


class WorkersOfLoader(NamedTuple):
    """Workers of one iterator."""

    loader: int  # number of its loader in this process, from 0
    pids: tuple[int, ...]  # process ids, by the worker's number


class LoaderWorker(NamedTuple):
    """A worker process."""

    number: int  # its number in the loader, from 0
    pid: int
    waits_for_batch: int | None  # number of the batch that the rank waits for from it; None for another worker
    start_method: str = ""  # by which it was started: fork, spawn, forkserver; empty if not known


def follow_iterator(iterator: Any, loader: int = 0) -> None:
    """Remember an iterator while it lives.

    Args:
        iterator: of a DataLoader; its private attribute `_workers` has the processes.
    """
    _iterators.add(iterator)
    if processes := getattr(iterator, "_workers", None):
        pids = tuple(int(process.pid or 0) for process in processes)
        _pids[weakref.ref(iterator, _forget)] = WorkersOfLoader(loader, pids)


def _forget(gone: weakref.ref[Any]) -> None:
    _pids.pop(gone, None)


def worker_pids() -> tuple[WorkersOfLoader, ...]:
    """Return the workers of each live iterator that has any, oldest first."""
    return tuple(_pids.values())


def awaited_loader(frame: FrameType | None) -> int | None:
    """Return the `id` of the iterator whose next batch a thread waits to receive; None if it does something else."""
    for each in stack_frames(frame, _MAX_DEPTH):
        if each.f_code.co_name == _RECEIVING and each.f_code.co_filename.endswith(_FILES):
            return id(each.f_locals.get("self"))

    return None


def workers_of_loaders(awaited: int | None) -> list[LoaderWorker]:
    """Return the workers of all live iterators. It reads attributes that are private to torch: without them, none.

    Args:
        awaited: `id` of the iterator that the rank waits for. For other iterators a missing batch means nothing: they
            receive none until they are asked for the next one.
    """
    return [worker for iterator in list(_iterators) for worker in _workers_of(iterator, awaited)]


def _workers_of(iterator: Any, awaited: int | None) -> Iterator[LoaderWorker]:
    missing = _missing_batch(iterator) if id(iterator) == awaited else None
    for number, process in enumerate(getattr(iterator, "_workers", ())):
        batch = missing[0] if missing is not None and missing[1] == number else None
        method = getattr(process, "_start_method", "") or multiprocessing.get_start_method(allow_none=True) or ""
        yield LoaderWorker(number, int(process.pid or 0), batch, method)


def _missing_batch(iterator: Any) -> tuple[int, int] | None:
    """Return the next batch to give and its worker, if the worker has not delivered it."""
    tasks = getattr(iterator, "_task_info", {})
    for number in range(getattr(iterator, "_rcvd_idx", 0), getattr(iterator, "_send_idx", 0)):
        task = tasks.get(number)
        if task is not None:
            return (number, int(task[0])) if len(task) == 1 else None

    return None


@uncounted
def watch_workers(patches: Patches, clock: StepClock, lost: deque[dict[str, Any]]) -> None:
    """Append the facts of each loader worker that dies: its process, number, step, and signal or status.

    Args:
        lost: receives the facts. They come from a signal handler, which may interrupt code that holds a lock, so
            nothing more is done with them here.
    """
    from torch.utils.data._utils import signal_handling
    from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

    handling: Any = signal_handling
    check = handling._error_if_any_worker_fails
    mark = _MultiProcessingDataLoaderIter._mark_worker_as_unavailable
    noted: set[int] = set()

    def note(pid: int, message: str, status: int | None) -> None:
        if pid not in noted:
            noted.add(pid)
            lost.append(_facts(pid, message, status, clock))

    def _error_if_any_worker_fails() -> None:
        try:
            check()
        except RuntimeError as error:
            with fail_open(_log, "instrument", _UNRECORDED, once=True):
                found = _PID.search(str(error))
                pid = int(found[1]) if found else 0
                note(pid, str(error), uncollected_status(pid))

            if not clock.open_slots[Slot.EXIT_START]:
                raise

    def _mark_worker_as_unavailable(self: Any, worker_id: int, shutdown: bool = False) -> None:
        with fail_open(_log, "instrument", _UNRECORDED, once=True):
            process = self._workers[worker_id]
            if not shutdown and process.exitcode:
                message = f"DataLoader worker (pid {process.pid}) exited unexpectedly"
                note(process.pid, message, process.exitcode)

        mark(self, worker_id, shutdown)

    patches.wrap(handling, "_error_if_any_worker_fails", _error_if_any_worker_fails)
    patches.wrap(_MultiProcessingDataLoaderIter, "_mark_worker_as_unavailable", _mark_worker_as_unavailable)


def _facts(pid: int, message: str, status: int | None, clock: StepClock) -> dict[str, Any]:
    facts: dict[str, Any] = {"t_ns": monotonic_ns(), "pid": pid, "message": message.strip()[:200]}
    step = clock.open_slots[Slot.STEP]
    if step >= 0:
        facts["step"] = step

    return facts | _number(pid) | _ended(status)


def _number(pid: int) -> dict[str, Any]:
    for group in worker_pids():
        if pid in group.pids:
            return {"worker": group.pids.index(pid), "workers": len(group.pids)}

    return {}


def _ended(status: int | None) -> dict[str, int]:
    """Return the signal or the exit status of a process."""
    if status is None:
        return {}

    return {"signal": -status} if status < 0 else {"code": status}
