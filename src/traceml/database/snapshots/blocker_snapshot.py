"""Snapshot of the process that another one waits for.

Process: rank, aggregator and agent.
"""

from __future__ import annotations

from traceml.database.snapshots.rank_snapshot import ProcessSnapshot
from traceml.inspection.blocking_process import blocking_process, file_lock_holder, skip_shells
from traceml.inspection.kernel_state import wait_state
from traceml.inspection.program_names import program_name

__all__ = ["blocker_of"]


def blocker_of(pid: int, thread: int, *, child: int | None = None, lock: str = "") -> ProcessSnapshot | None:
    """Return the process that a thread waits for; None if it waits for none, or that is not known.

    Args:
        thread: its thread that waits.
        child: the child that it waits for, where that is known.
        lock: the lock file that it looks at again and again, if it does.
    """
    blocker = _awaited(pid, thread, child, lock)
    if blocker is None:
        return None

    seen = wait_state(blocker)
    return ProcessSnapshot(
        pid=blocker,
        is_self=blocker == pid,
        name=program_name(blocker),
        state=seen.state,
        wchan=seen.wchan,
        waits_on=seen.waits_on,
    )


def _awaited(pid: int, thread: int, child: int | None, lock: str) -> int | None:
    if lock:
        return file_lock_holder(lock)

    return blocking_process(pid, thread) if child is None else skip_shells(child)
