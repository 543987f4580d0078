"""Time in which the process did not run: stopped by a signal or a debugger, or frozen or suspended with others."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from typing import Any

from traceml.clock import monotonic_ns
from traceml.clock import own_time as time
from traceml.database.info_kinds import InfoKind, InfoSender
from traceml.database.schema import Slot
from traceml.samplers.procfs import ProcFile

__all__ = ["StopDetector"]

_SHORTEST_NS = 1_500_000_000
_MAX_CORE_WAIT = 0.25  # share of the time: more, and it waited for a core
_MAX_SWITCHES = 20.0  # per second: a thread that waits for the GIL wakes 200 times a second


class StopDetector:
    """Tells a stopped process from one that waits for a core, the GIL or memory, when a sleep lasted too long.

    Whoever is stopped neither wakes nor waits for a core. All methods are for the thread that sleeps. Where the kernel
    does not show how long a thread waited for a core, no stop is noted. While the whole machine is suspended, its
    monotonic clock does not advance and the clock since boot does, which distinguishes the two.

    Args:
        note: appends a row to `info`.
    """

    def __init__(self, slots: Mapping[int, int] | Any, note: InfoSender) -> None:
        self._slots, self._note = slots, note
        self._sched: ProcFile | None = None
        self._before: tuple[int, int, int] | None = None
        self._step = slots[Slot.STEP]
        self._suspended_ns = _suspended_ns()

    def poll(self) -> None:
        """Record what the thread has used so far, and note a suspension; call at least once a second."""
        self._check_suspended()
        self._before = self._used()
        self._step = self._slots[Slot.STEP]

    def slept(self, asked_s: float, began_ns: int) -> None:
        """Check a sleep that began then and was to last so long; note it if the process did not run meanwhile."""
        late_ns = monotonic_ns() - began_ns - int(asked_s * 1e9)
        if late_ns < _SHORTEST_NS or self._before is None or (used := self._used()) is None:
            return

        core_wait_ns, switches, faults = (now - before for now, before in zip(used, self._before, strict=True))
        if core_wait_ns > _MAX_CORE_WAIT * late_ns or switches > _MAX_SWITCHES * late_ns / 1e9 or faults:
            return

        slots = self._slots
        self._append(late_ns, "steps" if slots[Slot.STEP_START] else "startup" if slots[Slot.STEP] < 0 else "outside")

    def close(self) -> None:
        """Note a suspension since the last call, and close the open file."""
        self._check_suspended()
        if self._sched is not None:
            self._sched.close()

    def _check_suspended(self) -> None:
        before, self._suspended_ns = self._suspended_ns, _suspended_ns()
        if self._suspended_ns - before >= _SHORTEST_NS:
            self._append(self._suspended_ns - before, "suspended")

    def _append(self, ns: int, part: str) -> None:
        """Append a row; other threads may have begun further steps since, so it has the last one before, too."""
        seconds = round(ns / 1e9, 3)
        self._note(
            InfoKind.STOPPED, seconds=seconds, step=self._slots[Slot.STEP], part=part, from_step=self._step,
            began_s=round(time.time() - seconds, 3),
        )  # fmt: skip

    def _used(self) -> tuple[int, int, int] | None:
        """Return the thread's wait for cores (ns), voluntary switches, and page faults that read from a disk."""
        try:
            self._sched = self._sched or ProcFile("/proc/thread-self/schedstat", 256)
            core_wait_ns = int(self._sched.read().split(None, 2)[1])
        except (OSError, ValueError, IndexError):  # a kernel without these figures
            return None

        usage = resource.getrusage(resource.RUSAGE_THREAD)
        return core_wait_ns, usage.ru_nvcsw, usage.ru_majflt


def _suspended_ns() -> int:
    """Return the time since boot in which this machine was suspended."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.clock_gettime_ns(time.CLOCK_MONOTONIC)
