"""Time in which the process did not run: stopped by a signal or a debugger, in a frozen container, a paused machine."""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping
from typing import Any

from traceml.clock import monotonic_ns
from traceml.database.schema import Slot
from traceml.samplers.procfs import ProcFile

__all__ = ["StopMeter"]

_SHORTEST_NS = 1_500_000_000
_MOST_CORE_WAIT = 0.25  # share of the time: more, and it waited for a core
_MOST_SWITCHES = 20.0  # per second: a thread that waits for the GIL wakes 200 times a second


class StopMeter:
    """Tells a stopped process from one that waits for a core, the GIL or memory, when a sleep lasted too long.

    Whoever is stopped neither wakes nor waits for a core. All methods are for the thread that sleeps. Where the kernel
    does not tell how long a thread waited for a core, nothing is noted.

    Args:
        slots: open-phase words of the flight file.
        note: appends a row to `info`.
    """

    def __init__(self, slots: Mapping[int, int] | Any, note: Callable[..., None]) -> None:
        self._slots, self._note = slots, note
        self._sched: ProcFile | None = None
        self._before: tuple[int, int, int] | None = None

    def turn(self) -> None:
        """Record what the thread has used so far; call at least once a second."""
        self._before = self._used()

    def slept(self, asked_s: float, began_ns: int) -> None:
        """Check a sleep that began then and was to last so long; note it if the process was stopped."""
        late_ns = monotonic_ns() - began_ns - int(asked_s * 1e9)
        if late_ns < _SHORTEST_NS or self._before is None or (used := self._used()) is None:
            return

        core_wait_ns, switches, faults = (now - before for now, before in zip(used, self._before, strict=True))
        if core_wait_ns > _MOST_CORE_WAIT * late_ns or switches > _MOST_SWITCHES * late_ns / 1e9 or faults:
            return

        slots = self._slots
        part = "steps" if slots[Slot.STEP_START] else "startup" if slots[Slot.STEP] < 0 else "outside"
        self._note("stopped", seconds=round(late_ns / 1e9, 3), step=slots[Slot.STEP], part=part)

    def close(self) -> None:
        """Close the open file."""
        if self._sched is not None:
            self._sched.close()

    def _used(self) -> tuple[int, int, int] | None:
        """Return the thread's wait for cores (ns), voluntary switches, and page faults that read from a disk."""
        try:
            self._sched = self._sched or ProcFile("/proc/thread-self/schedstat", 256)
            core_wait_ns = int(self._sched.read().split(None, 2)[1])
        except (OSError, ValueError, IndexError):  # a kernel without these figures
            return None

        usage = resource.getrusage(resource.RUSAGE_THREAD)
        return core_wait_ns, usage.ru_nvcsw, usage.ru_majflt
