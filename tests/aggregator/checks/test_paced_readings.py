"""Readings in a thread, and when the next may begin."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import pytest

from tests.fake_time import FakeTime
from traceml.aggregator.checks import paced_readings
from traceml.aggregator.checks.paced_readings import PacedReadings


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    made = FakeTime()
    monkeypatch.setattr(paced_readings, "time", made)
    return made


def test_a_costly_reading_is_followed_by_a_longer_pause(clock: FakeTime) -> None:
    """A reading that takes 1 s of CPU time is repeated 200 s later, a cheap one after the least pause."""
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
def test_a_reading_that_fails_is_tried_again(fails: str, clock: FakeTime, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, and the next one is a minute later."""
    begun: list[Coroutine[Any, Any, None]] = []
    paced = PacedReadings(begun.append, f"the {fails} failed")

    def broken(*_result: object) -> Any:
        raise RuntimeError("no")

    paced.begin(broken if fails == "read" else int, broken, 3)
    asyncio.run(begun.pop())

    assert f"the {fails} failed" in caplog.text
    clock.now_s += 59
    assert not paced.is_due
    clock.now_s += 1
    assert paced.is_due
