"""When a process that died is started again."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Restarts"]

_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _LIVED_LONG_S = 0.5, 30.0, 60.0


class Restarts:
    """Waits longer from start to start, and begins anew with one that lived long.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started_s = self._due_s = 0.0
        self._pause_s = _FIRST_PAUSE_S

    def started(self) -> None:
        """Take note that the process was started just now."""
        self._started_s = self._clock()

    def due(self) -> bool:
        """Whether a process that is dead is to be started now; if so, the next one waits."""
        now_s = self._clock()
        if now_s < self._due_s:
            return False

        if now_s - self._started_s > _LIVED_LONG_S:
            self._pause_s = _FIRST_PAUSE_S

        self._due_s = now_s + self._pause_s
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        return True
