"""The books of a Runtime: how many tasks are where, which ended lately, and which failed.

Counting costs a task no lock. Each thread adds to two numbers of its own, begun and ended, in one list that is copied
in one atomic operation; so a snapshot is a state that was. What is rarer than a plain end, and changes two numbers at
once, is done under the lock that a snapshot takes.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from traceml.tasks.handle import TaskHandle
    from traceml.tasks.seats import Seat

__all__ = ["RECORDS", "Ledger", "Record", "Tally"]

RECORDS = 1000  # of the tasks that ended last
_FAILED, _CANCELLED, _TIMED_OUT, _SKIPPED, _OVERDUE = range(5)
_FIXED = 5

# name, state, when it was submitted, begun and ended (perf_counter, s), its last report of progress (%)
Record = tuple[str, str, float, float, float, "float | None"]


@dataclass(frozen=True, slots=True)
class Tally:
    """How many tasks there are in which state, all at one moment."""

    total: int
    completed: int
    failed: int
    cancelled: int
    timed_out: int
    running: int
    queued: int


class Ledger:
    """Counters, records and failures of one Runtime."""

    # Bells of those who wait for all tasks, of any Runtime: who waits for whom goes across.
    sleepers: ClassVar[list[Any]] = []

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a finalizer may come in between, and wait for a task
        self.records: deque[Record] = deque(maxlen=RECORDS)
        self.failures: list[TaskHandle[Any]] = []
        self.complaints: deque[tuple[str, str]] = deque(maxlen=RECORDS)  # errors of error callbacks
        self.reporting: set[TaskHandle[Any]] = set()  # ended, and their error callback has not returned yet
        self.clear()

    def clear(self) -> None:
        """Begin again from zero, as a forked child does."""
        self.counts = [0] * _FIXED
        self.slots: dict[int, int] = {}
        self.seats: dict[int, Seat] = {}
        self._submissions = itertools.count()
        self.count_submission = self._submissions.__next__
        self.reporting.clear()

    def slot_of(self, seat: Seat) -> int:
        """Return where the thread of a seat counts: begun tasks there, ended ones in the next place."""
        slot = self.slots.get(seat.ident)
        if slot is None:
            with self.lock:
                slot = self.slots[seat.ident] = len(self.counts)
                self.counts += (0, 0)

        self.seats[seat.ident] = seat  # idents are used again, and so are their slots
        return slot

    def count_failed(self, handle: TaskHandle[Any], slot: int) -> None:
        """Count a task that began and raised; the lock is held."""
        self.counts[_FAILED] += 1
        self.counts[slot + 1] += 1
        self._keep(handle)

    def count_cancelled(self, slot: int | None) -> None:
        """Count a cancelled task, which had begun on a slot or had not; the lock is held."""
        self.counts[_CANCELLED] += 1
        if slot is None:
            self.counts[_SKIPPED] += 1
        else:
            self.counts[slot + 1] += 1

    def count_timed_out(self, handle: TaskHandle[Any]) -> None:
        """Count a task whose time is over while its thread is still in it; the lock is held."""
        self.counts[_TIMED_OUT] += 1
        self.counts[_OVERDUE] += 1
        self._keep(handle)

    def count_returned(self, slot: int) -> None:
        """Count that a thread came back from a task that had timed out; the lock is held."""
        self.counts[_OVERDUE] -= 1
        self.counts[slot + 1] += 1

    def wake_sleepers(self) -> None:
        """Let those who wait for all tasks look again: something has ended, or waits itself."""
        while self.sleepers:
            try:
                self.sleepers.pop().ring()
            except IndexError:  # another thread was faster
                return

    def _keep(self, handle: TaskHandle[Any]) -> None:
        self.failures.append(handle)
        self.reporting.add(handle)

    def tally(self) -> Tally:
        """Count the tasks by state, at one moment."""
        for _ in range(100):  # a thread switch between the two readings is rare, and costs another round
            submitted, counts = self._read()
            if submitted == self._submitted():
                break

        failed, cancelled, timed_out, skipped, overdue = counts[:_FIXED]
        begun, ended = sum(counts[_FIXED::2]), sum(counts[_FIXED + 1 :: 2])
        return Tally(
            total=submitted,
            completed=ended - failed - (cancelled - skipped) - (timed_out - overdue),
            failed=failed,
            cancelled=cancelled,
            timed_out=timed_out,
            running=begun - ended - overdue,
            queued=submitted - begun - skipped,
        )

    def _read(self) -> tuple[int, list[int]]:
        with self.lock:
            counts = self.counts.copy()
            return self._submitted(), counts

    def _submitted(self) -> int:
        return int(repr(self._submissions)[6:-1])  # "count(7)": an iterator's only way to be read without moving it
