"""The interpreter's switch interval, shortened while the training thread is sampled.

A thread that waits for the GIL requests it after this interval, by default 5 ms. Before that it gets the
lock only if the holder releases it on its own. So without a short interval, samples are taken only at such places.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from traceml.clock import own_time as time
from traceml.inspection.process_times import python_threads_ns

__all__ = [
    "LONGEST_S",
    "MAX_SLEEP_S",
    "MIN_SLEEP_S",
    "SHORT_S",
    "BusyThreads",
    "OtherThreads",
    "SwitchInterval",
    "reduce_timer_slack",
    "switch_interval",
]

SHORT_S = 50e-6
"""The short interval where the training thread has a core."""
LONGEST_S = 100e-6
"""Longest switch interval of an armed sample. With 400 us, a data set that computes for 300 us between two calls of
torch was in 4 % of the samples of its fetches, not 85 %: where the lock is released sooner, it is never asked for.
"""
MIN_SLEEP_S, MAX_SLEEP_S = 0.002, 0.012
"""Limits of the random sleep with a short interval before a sample."""
_TIMER_SLACK_NS = 1000  # of 50,000 as usual, which the kernel adds to each wait
_BUSY_SHARE = 0.02
_CHECK_NS = 250_000_000  # the time from one check of all threads to the next, each of which costs 30 us


class SwitchInterval:
    """Shortens the switch interval, and restores it unless the script has set its own meanwhile."""

    def __init__(self) -> None:
        self._usual = self._short = 0.0

    def shorten(self, seconds: float = SHORT_S) -> bool:
        """Make it short until `restore`; return whether it was so already."""
        usual = sys.getswitchinterval()
        was_short = usual == self._short
        self._usual = self._usual if was_short else usual
        sys.setswitchinterval(seconds)
        self._short = sys.getswitchinterval()
        return was_short

    def restore(self) -> None:
        """Make it the script's again."""
        if self._short and sys.getswitchinterval() == self._short:
            sys.setswitchinterval(self._usual)

        self._short = 0.0


def reduce_timer_slack() -> None:
    """Let the waits of this thread end in time, where the system can do that.

    On busy cores a thread that sleeps for tens of microseconds more loses its core, and gets it again when the training
    thread waits: then code that holds the lock was in 62 % of samples instead of 75 % of the time.
    """
    with suppress(OSError):
        Path(f"/proc/{threading.get_native_id()}/timerslack_ns").write_text(str(_TIMER_SLACK_NS))


class BusyThreads(NamedTuple):
    """CPU time of other threads in a period of time, and the identifier of the one that used most of it."""

    busiest: int
    passed_ns: int
    cpu_ns: int


class OtherThreads:
    """Tells whether Python threads of the script compute at the same time as the training thread.

    Threads that compute take the lock from each other, and with a short interval they do so all the time.
    """

    def __init__(self) -> None:
        self._used_ns: dict[int, int] = {}
        self._checked_ns = 0
        self._busiest: BusyThreads | None = None

    @property
    def are_busy(self) -> bool:
        """Whether they computed for a fiftieth of a time of at least 250 ms before the last look at them."""
        return self._busiest is not None

    def check(self, training: int) -> BusyThreads | None:
        """Look at them again if that is due; return what they did since the last time, if they were busy."""
        now = time.monotonic_ns()
        passed_ns = now - self._checked_ns
        if passed_ns < _CHECK_NS:
            return None

        used = self._used(training)
        busy = {ident: used_ns - self._used_ns.get(ident, used_ns) for ident, used_ns in used.items()}
        self._used_ns, self._checked_ns, busy_ns = used, now, sum(busy.values())
        is_busy = busy_ns > _BUSY_SHARE * passed_ns
        self._busiest = BusyThreads(max(busy, key=lambda each: busy[each]), passed_ns, busy_ns) if is_busy else None
        return self._busiest

    def _used(self, training: int) -> dict[int, int]:
        """Return the CPU time of each thread but the training's and the caller's."""
        apart = (training, threading.get_ident())
        return {ident: used_ns for ident, used_ns in python_threads_ns().items() if ident not in apart}


switch_interval = SwitchInterval()
"""The one of this process."""
os.register_at_fork(after_in_child=switch_interval.restore)
