"""Readings in a thread, and when the next may begin."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import pytest

from traceml.aggregator.checks import paced_readings
from traceml.aggregator.checks.paced_readings import PacedReadings


class Clock:
    """Stands in for `time.monotonic` and `time.thread_time`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = self.cpu_s = 0.0
        monkeypatch.setattr(paced_readings, "time", self)

    def monotonic(self) -> float:
        """Return the time."""
        return self.now_s

    def thread_time(self) -> float:
        """Return the CPU time."""
        return self.cpu_s


def test_a_costly_reading_is_followed_by_a_longer_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reading that takes 1 s of CPU time is repeated 200 s later, a cheap one after the least pause."""
    clock = Clock(monkeypatch)
    begun: list[Coroutine[Any, Any, None]] = []
    paced, threads, costs_s = PacedReadings(begun.append, "it failed"), list[int](), [0.001, 1.0]

    def read() -> int:
        clock.cpu_s += costs_s.pop(0)
        return threading.get_ident()

    for pause_s in (3, 200):
        assert paced.is_due
        paced.begin(read, threads.append, 3)
        assert not paced.is_due  # one at a time, however long it takes
        asyncio.run(begun.pop())
        clock.now_s += pause_s - 0.5
        assert not paced.is_due
        clock.now_s += 0.5

    assert paced.is_due
    assert len(threads) == 2
    assert threading.get_ident() not in threads


@pytest.mark.parametrize("fails", ["read", "take"])
def test_a_reading_that_fails_is_tried_again(
    fails: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, and the next one is a minute later."""
    clock = Clock(monkeypatch)
    begun: list[Coroutine[Any, Any, None]] = []
    paced = PacedReadings(begun.append, f"the {fails} failed")

    def broken(*_result: object) -> Any:
        raise RuntimeError("no")

    paced.begin(broken if fails == "read" else int, broken, 3)
    asyncio.run(begun.pop())

    assert f"the {fails} failed" in caplog.text
    clock.now_s = 59
    assert not paced.is_due
    clock.now_s = 60
    assert paced.is_due
