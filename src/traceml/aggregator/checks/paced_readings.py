"""Background readings, at a rate that bounds their share of a core."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from traceml.fail_open import fail_open

__all__ = ["PacedReadings"]

T = TypeVar("T")

_AFTER_FAILURE_S = 60.0

_log = logging.getLogger("traceml")


class PacedReadings:
    """Readings of one kind, one at a time, in a thread.

    Args:
        start: runs a coroutine beside what else the aggregator does.
        failed: text that is logged where a reading fails.
        pause: after a reading, as a multiple of its own CPU time; 200: they take at most a 200th of a core.
    """

    def __init__(self, start: Callable[[Any], None], failed: str, pause: int = 200) -> None:
        self._start, self._failed, self._pause = start, failed, pause
        self._due_s = 0.0
        self._is_reading = False

    @property
    def is_due(self) -> bool:
        """Whether the next reading may begin."""
        return not self._is_reading and time.monotonic() >= self._due_s

    def begin(self, read: Callable[[], T], take: Callable[[T], None], pause_s: float) -> None:
        """Begin one.

        Args:
            read: called in a thread.
            take: called in the event loop with what it returns.
            pause_s: least pause until the next.
        """
        self._is_reading = True
        self._start(self._read(read, take, pause_s))

    async def _read(self, read: Callable[[], T], take: Callable[[T], None], pause_s: float) -> None:
        until_next_s = _AFTER_FAILURE_S
        with fail_open(_log, "aggregator", self._failed, once=True):
            result, cost_s = await asyncio.to_thread(_measured, read)
            take(result)
            until_next_s = max(pause_s, self._pause * cost_s)

        self._due_s = time.monotonic() + until_next_s
        self._is_reading = False


def _measured(read: Callable[[], T]) -> tuple[T, float]:
    """Return a result, and the CPU time that it took, seconds."""
    began_s = time.thread_time()
    return read(), time.thread_time() - began_s
