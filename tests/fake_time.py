"""Time that a test moves, in place of the module `time`."""

from __future__ import annotations

__all__ = ["FakeTime"]


class FakeTime:
    """Stands in for the module `time`: neither clock moves by itself, on a busy machine either.

    Attributes:
        now_s: seconds of the monotonic clock.
        cpu_s: CPU time of the thread, in seconds.
    """

    def __init__(self) -> None:
        self.now_s, self.cpu_s = 1000.0, 0.0

    def monotonic(self) -> float:
        """Return the seconds of the monotonic clock."""
        return self.now_s

    def thread_time(self) -> float:
        """Return the CPU time of the thread, in seconds."""
        return self.cpu_s

    def time(self) -> float:
        """Return the epoch seconds."""
        return 1e9 + self.now_s
