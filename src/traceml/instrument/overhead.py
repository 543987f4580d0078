"""What the hooks cost on this rank, measured where they run.

Once in 64 steps, right after a real step, when the caches are as cold for our code as a training step leaves them, one
timed call of an empty function and one row into a ring of its own are run against the clock. A step's cost is then the
row plus one call per phase entry of that step. The clock reads of the measurement itself are subtracted. A rolling mean
over the last 32 measurements is reported.
"""

from __future__ import annotations

from collections.abc import Callable

from traceml.clock import monotonic_ns
from traceml.database.flight import FlightFile
from traceml.database.schema import LOGS, PACKED
from traceml.instrument.clock import StepClock

__all__ = ["Overhead"]

_ROWS = 64


class Overhead:
    """Measures the cost of hooks on a clock that nobody else uses.

    Args:
        make_call: returns a timed call of an empty function for a clock.
    """

    def __init__(self, make_call: Callable[[StepClock], Callable[[], None]]) -> None:
        self._clock = StepClock(_scratch_flight(), _Silent())
        self._clock.thread = -1
        self._call = make_call(self._clock)
        self._mean_ns = 0.0
        self._samples = 0

    @property
    def ns_per_step(self) -> int:
        """Cost per step in ns; 0 before the first measurement."""
        return round(self._mean_ns)

    def measure(self, thread: int, entries: int) -> None:
        """Take one measurement.

        Args:
            thread: the training thread, which calls this.
            entries: how many phases the step before entered.
        """
        clock, call = self._clock, self._call
        clock.thread = thread
        t0 = monotonic_ns()
        t1 = monotonic_ns()
        call()
        t2 = monotonic_ns()
        clock.commit(t2)
        t3 = monotonic_ns()
        read = t1 - t0
        sample = max(0, t2 - t1 - read) * entries + max(0, t3 - t2 - read)
        self._samples = min(self._samples + 1, 32)
        self._mean_ns += (sample - self._mean_ns) / self._samples


class _Silent:
    """A listener that does nothing."""

    def first_backward(self) -> bool:
        return True

    def new_optimizer(self, optimizer: object) -> None: ...

    def step_without_forward(self) -> None: ...

    def upkeep(self) -> None: ...


def _scratch_flight() -> FlightFile:
    """Rings in plain memory, as small as they may be."""
    import mmap

    capacities = {table.name: _ROWS for table in PACKED} | {log.name: 1024 for log in LOGS}
    size = 1 << 20
    return FlightFile(mmap.mmap(-1, size), capacities, {}, None, -1)
