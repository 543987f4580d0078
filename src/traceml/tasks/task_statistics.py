"""States of tasks, their counters, and the records of the tasks that ended last.

A plain task is counted without a lock. Each thread adds to two numbers of its own, begun and ended, in one list that is
copied in one atomic operation, so a snapshot is consistent. Rarer events change two numbers at once, under the lock
that a snapshot takes.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque

__all__ = [
    "CANCELLED",
    "COMPLETED",
    "FAILED",
    "FINAL",
    "QUEUED",
    "RECORDS",
    "RUNNING",
    "TIMED_OUT",
    "EndedTask",
    "TaskStatistics",
]

QUEUED = "queued"
RUNNING = "running"
COMPLETED = "completed"
FAILED = "failed"
CANCELLED = "cancelled"
TIMED_OUT = "timed_out"

FINAL = frozenset({COMPLETED, FAILED, CANCELLED, TIMED_OUT})

RECORDS = 1000  # of the tasks that ended last
_INDEX = {FAILED: 0, CANCELLED: 1, TIMED_OUT: 2}
_SKIPPED, _OVERDUE, _FIXED = 3, 4, 5

# name, state, times of submission, start and end (perf_counter, s), last reported progress (%)
EndedTask = tuple[str, str, float, float, float, "float | None"]


class TaskStatistics:
    """Counters and records of one Runtime."""

    def __init__(self) -> None:
        self.records: deque[EndedTask] = deque(maxlen=RECORDS)
        self.counts = [0] * _FIXED
        self._slots: dict[int, int] = {}
        self.reset()

    def reset(self, running: int = 0) -> None:
        """Start again from zero, as a forked child does.

        Args:
            running: tasks that this thread has begun and continues; its slot stays the same.
        """
        self.lock = threading.RLock()  # a finalizer may interrupt, and wait for a task
        self.counts[:] = [0] * len(self.counts)
        self._submissions = itertools.count(running)
        self.count_submission = self._submissions.__next__
        if running:
            self.counts[self.slot_of(threading.get_ident())] = running

    def slot_of(self, thread_ident: int) -> int:
        """Return the index where a thread counts begun tasks; it counts ended ones at the next index."""
        slot = self._slots.get(thread_ident)
        if slot is None:
            with self.lock:
                slot = self._slots[thread_ident] = len(self.counts)
                self.counts += (0, 0)

        return slot

    def count_end(self, state: str, slot: int | None) -> None:
        """Count the end of a task, with the slot of its thread if it returned; the lock is held.

        Without a slot it was cancelled before it began, or timed out while its thread still runs it.
        """
        if state is not COMPLETED:
            self.counts[_INDEX[state]] += 1

        if slot is not None:
            self.counts[slot + 1] += 1
        else:
            self.counts[_SKIPPED if state is CANCELLED else _OVERDUE] += 1

    def count_returned(self, slot: int) -> None:
        """Count the return of a thread from a task that had timed out; the lock is held."""
        self.counts[_OVERDUE] -= 1
        self.counts[slot + 1] += 1

    def snapshot(self) -> dict[str, int]:
        """Count the tasks by state, and in total, at one moment."""
        for _ in range(100):  # a thread switch between the two readings is rare, and costs another round
            with self.lock:
                counts = self.counts.copy()
                submitted = self._submitted()

            if submitted == self._submitted():
                break

        failed, cancelled, timed_out, skipped, overdue = counts[:_FIXED]
        begun, ended = sum(counts[_FIXED::2]), sum(counts[_FIXED + 1 :: 2])
        return {
            "total": submitted,
            COMPLETED: ended - failed - (cancelled - skipped) - (timed_out - overdue),
            RUNNING: begun - ended - overdue,
            QUEUED: submitted - begun - skipped,
            FAILED: failed,
            CANCELLED: cancelled,
            TIMED_OUT: timed_out,
        }

    def _submitted(self) -> int:
        return int(repr(self._submissions)[6:-1])  # "count(7)": an iterator can be read without a step only by its text
