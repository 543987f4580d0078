"""Assembly of the watch for a rank without progress."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from traceml.fail_open import fail_open
from traceml.inspection import stack_signal
from traceml.inspection.crash_stacks import enable_crash_stacks
from traceml.instrument.groups.group_snapshots import GroupSnapshots
from traceml.recorder.no_progress.progress_counters import ProgressCounters
from traceml.recorder.no_progress.progress_watch import ProgressWatch
from traceml.recorder.user_code import UserCode

if TYPE_CHECKING:
    from traceml.database.flight.flight import FlightFile
    from traceml.database.snapshots.rank_snapshot import ThreadSnapshot
    from traceml.instrument.loader import DataProgress
    from traceml.instrument.step_clock import StepClock
    from traceml.recorder.no_progress.snapshot_maker import SnapshotMaker

__all__ = ["progress_watch", "register_stacks"]

_log = logging.getLogger("traceml")


def progress_watch(
    flight: FlightFile,
    *,
    rank: Callable[[], int],
    thread: Callable[[], int],
    clock: Callable[[], StepClock | None],
    data: Callable[[], DataProgress | None],
    failed_threads: Callable[[], tuple[ThreadSnapshot, ...]],
    hang_timeout_s: float,
) -> ProgressWatch:
    """Return the watch of this process.

    Args:
        thread: returns the id of the training thread.
        clock: returns the clock of the open step, None while nothing is traced.
        data: returns how far the data of the training loader is read.
    """
    user, groups = UserCode(), GroupSnapshots()

    def work() -> tuple[int, ...]:
        step = clock()
        return (step.eval_batches, step.input_ns, step.forward_ns, step.backward_ns) if step is not None else ()

    def is_evaluating() -> bool:
        current = clock()
        return current is not None and current.is_evaluating

    def maker() -> SnapshotMaker:
        from traceml.recorder.no_progress.snapshot_maker import SnapshotMaker  # a healthy rank does not pay for it
        from traceml.recorder.no_progress.worker_snapshots import WorkerSnapshots

        return SnapshotMaker(
            flight,
            rank=rank,
            thread=thread,
            user=user,
            is_evaluating=is_evaluating,
            data=data,
            groups=groups.read,
            workers=WorkerSnapshots(stack_signal.find_stack_file(os.getpid()), hang_timeout_s).make,
            failed_threads=failed_threads,
        )

    return ProgressWatch(flight, ProgressCounters(flight, thread, user, work, groups.state), maker, hang_timeout_s)


def register_stacks(crash_file: int | None) -> None:
    """Let another process of this host ask for the Python stacks, unless something else uses the signal.

    Args:
        crash_file: descriptor of a file that gets them at its end when this process crashes; None for none.
    """
    with fail_open(_log, "recorder", "the stacks of a crash cannot be reported"):
        if crash_file is not None:
            enable_crash_stacks(crash_file)

    with fail_open(_log, "recorder", "the stacks of a silent process cannot be reported"):
        if not stack_signal.is_registered(os.getpid()):
            stack_signal.register(stack_signal.create_stack_file())
