"""Counters of a Runtime, and the records of the tasks that ended last.

A plain task is counted without a lock. Each thread adds to two numbers of its own, begun and ended, in one list that is
copied in one atomic operation, so a snapshot is consistent. Rarer events change two numbers at once, under the lock
that a snapshot takes.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from dataclasses import dataclass

__all__ = ["RECORDS", "EndedTask", "TaskCounts", "TaskStatistics"]

RECORDS = 1000  # of the tasks that ended last
_FAILED, _CANCELLED, _TIMED_OUT, _SKIPPED, _OVERDUE = range(5)
_FIXED = 5

# name, state, times of submission, start and end (perf_counter, s), last reported progress (%)
EndedTask = tuple[str, str, float, float, float, "float | None"]


@dataclass(frozen=True, slots=True)
class TaskCounts:
    """Number of tasks in each state, all at one moment."""

    total: int
    completed: int
    failed: int
    cancelled: int
    timed_out: int
    running: int
    queued: int


class TaskStatistics:
    """Counters and records of one Runtime."""

    def __init__(self) -> None:
        self.records: deque[EndedTask] = deque(maxlen=RECORDS)
        self.reset()

    def reset(self) -> None:
        """Start again from zero, as a forked child does."""
        self.lock = threading.RLock()  # a finalizer may interrupt, and wait for a task
        self.counts = [0] * _FIXED
        self._slots: dict[int, int] = {}
        self._submissions = itertools.count()
        self.count_submission = self._submissions.__next__

    def slot_of(self, thread_ident: int) -> int:
        """Return the index where a thread counts begun tasks; it counts ended ones at the next index."""
        slot = self._slots.get(thread_ident)
        if slot is None:
            with self.lock:
                slot = self._slots[thread_ident] = len(self.counts)
                self.counts += (0, 0)

        return slot

    def count_failed(self, slot: int) -> None:
        """Count a task that began and raised; the lock is held."""
        self.counts[_FAILED] += 1
        self.counts[slot + 1] += 1

    def count_cancelled(self, slot: int | None) -> None:
        """Count a cancelled task, which had begun on a slot or had not; the lock is held."""
        self.counts[_CANCELLED] += 1
        if slot is None:
            self.counts[_SKIPPED] += 1
        else:
            self.counts[slot + 1] += 1

    def count_timed_out(self) -> None:
        """Count a task whose time is over while its thread still runs it; the lock is held."""
        self.counts[_TIMED_OUT] += 1
        self.counts[_OVERDUE] += 1

    def count_returned(self, slot: int) -> None:
        """Count the return of a thread from a task that had timed out; the lock is held."""
        self.counts[_OVERDUE] -= 1
        self.counts[slot + 1] += 1

    def snapshot(self) -> TaskCounts:
        """Count the tasks by state, at one moment."""
        for _ in range(100):  # a thread switch between the two readings is rare, and costs another round
            with self.lock:
                counts = self.counts.copy()
                submitted = self._submitted()

            if submitted == self._submitted():
                break

        failed, cancelled, timed_out, skipped, overdue = counts[:_FIXED]
        begun, ended = sum(counts[_FIXED::2]), sum(counts[_FIXED + 1 :: 2])
        return TaskCounts(
            total=submitted,
            completed=ended - failed - (cancelled - skipped) - (timed_out - overdue),
            failed=failed,
            cancelled=cancelled,
            timed_out=timed_out,
            running=begun - ended - overdue,
            queued=submitted - begun - skipped,
        )

    def _submitted(self) -> int:
        return int(repr(self._submissions)[6:-1])  # "count(7)": an iterator can be read without a step only by its text
