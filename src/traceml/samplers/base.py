"""The sampler interface, and the scheduler that runs due samplers on the recorder's thread."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from traceml.clock import monotonic_ns
from traceml.clock import own_time as time
from traceml.database.schema import Table

__all__ = ["SampleRow", "Sampler", "SamplerScheduler", "SamplerStatistics"]

SampleRow = tuple[float, ...]
_log = logging.getLogger("traceml")

# Memory changes most while a job starts: a sampler may have a shorter interval during this time.
_START_NS = 30 * 10**9
_NEVER_NS = 2**62


class Sampler(ABC):
    """Reads values periodically and returns them as rows of one table.

    `sample` runs on the recorder's thread, takes microseconds, and raises when it cannot read; the scheduler counts it.
    """

    name: ClassVar[str]
    table: ClassVar[Table]
    start_interval_s: ClassVar[float | None] = None  # during the first 30 s, if shorter than the interval

    @abstractmethod
    def sample(self, t_ns: int, step: int) -> Iterable[SampleRow]:
        """Return the rows of one sample.

        Args:
            t_ns: the monotonic timestamp of the sample.
            step: the open training step; -1 without one.
        """

    def close(self) -> None:  # noqa: B027 - some samplers have none
        """Release resources."""


@dataclass(frozen=True, slots=True)
class SamplerStatistics:
    """Runs and costs of one sampler."""

    name: str
    interval_s: float
    samples: int
    errors: int
    total_ns: int
    max_ns: int


class _Entry:
    def __init__(self, sampler: Sampler, interval_ns: int, start_interval_ns: int, due_ns: int) -> None:
        self.sampler = sampler
        self.interval_ns, self.start_interval_ns, self.due_ns = interval_ns, start_interval_ns, due_ns
        self.samples = self.errors = self.total_ns = self.max_ns = 0

    def reschedule(self, now_ns: int, started_ns: int) -> None:
        interval = self.start_interval_ns if now_ns - started_ns < _START_NS else self.interval_ns
        # Missed samples are dropped: a process that was stopped must not resume with a burst. Whole intervals keep all
        # samplers in step, so that the thread wakes once for all of them.
        passed = max(0, now_ns + interval // 2 - self.due_ns)
        self.due_ns += max(1, -(-passed // interval)) * interval


class SamplerScheduler:
    """Runs samplers when they are due.

    Args:
        append: takes (table name, row).
        intervals_s: seconds between samples of single samplers, by name; also used during the start.
        on_error: called with (name, error) at the first failure of each sampler.
    """

    def __init__(
        self,
        samplers: Sequence[Sampler],
        append: Callable[[str, SampleRow], None],
        interval_s: float = 1.0,
        intervals_s: Mapping[str, float] = MappingProxyType({}),
        on_error: Callable[[str, Exception], None] = lambda _name, _error: None,
    ) -> None:
        self._append, self._on_error = append, on_error
        self._entries: list[_Entry] = []
        self._started_ns = monotonic_ns()
        for sampler in samplers:
            interval = intervals_s.get(sampler.name, interval_s)
            start = interval
            if sampler.start_interval_s is not None and sampler.name not in intervals_s:
                start = min(interval, sampler.start_interval_s)

            self._entries.append(_Entry(sampler, int(interval * 1e9), int(start * 1e9), self._started_ns))

    @property
    def due_ns(self) -> int:
        """The monotonic timestamp at which the next sampler is due."""
        return min((entry.due_ns for entry in self._entries), default=_NEVER_NS)

    def run_due(self, step: int) -> None:
        """Run the due samplers."""
        now = monotonic_ns()
        for entry in self._entries:
            if entry.due_ns <= now:
                self._run(entry, step)

    def run_all(self, step: int) -> None:
        """Run every sampler, for the last sample before the end."""
        for entry in self._entries:
            self._run(entry, step)

    def statistics(self) -> tuple[SamplerStatistics, ...]:
        """Return runs and costs of each sampler."""
        return tuple(
            SamplerStatistics(e.sampler.name, e.interval_ns / 1e9, e.samples, e.errors, e.total_ns, e.max_ns)
            for e in self._entries
        )

    @property
    def total_ns(self) -> int:
        """CPU time spent in samplers so far."""
        return sum(entry.total_ns for entry in self._entries)

    @property
    def errors(self) -> int:
        """Samples that failed so far."""
        return sum(entry.errors for entry in self._entries)

    def close(self) -> None:
        """Close every sampler; the statistics remain."""
        for entry in self._entries:
            try:
                entry.sampler.close()
            except Exception as error:  # noqa: BLE001 - fail open: the other samplers must be closed
                self._failed(entry, error)

            entry.due_ns = _NEVER_NS

    def _run(self, entry: _Entry, step: int) -> None:
        started = time.thread_time_ns()
        now = monotonic_ns()
        try:
            for row in entry.sampler.sample(now, step):
                self._append(entry.sampler.table.name, row)

            entry.samples += 1
        except Exception as error:  # noqa: BLE001 - fail open: the other samplers continue
            self._failed(entry, error)

        cost = time.thread_time_ns() - started
        entry.total_ns += cost
        entry.max_ns = max(entry.max_ns, cost)
        entry.reschedule(now, self._started_ns)

    def _failed(self, entry: _Entry, error: Exception) -> None:
        entry.errors += 1
        if entry.errors > 1:
            return

        _log.warning(
            "sampler %r failed: %s: %s; it will be retried, further failures are only counted",
            entry.sampler.name,
            type(error).__name__,
            error,
        )
        self._on_error(entry.sampler.name, error)
