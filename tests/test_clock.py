"""Dates that nothing sets."""

from __future__ import annotations

import time
from typing import Any

import pytest

from traceml.clock import SteadyClock, boot_id, monotonic_ns


def test_a_steady_clock_goes_on_when_the_wall_clock_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SteadyClock.start()
    before = clock.now_s()
    monkeypatch.setattr(time, "time", lambda: 0.0)

    assert 0 <= clock.now_s() - before < 60
    assert clock.epoch_s(clock.mono_ns + 5 * 10**9) == pytest.approx(clock.epoch_ns / 1e9 + 5)


def test_after_another_boot_the_wall_clock_goes_on() -> None:
    """It is never before the start."""
    past = SteadyClock(monotonic_ns(), int(1e18), "another boot")
    future = SteadyClock(monotonic_ns(), int(4e18), "another boot")

    assert past.now_s() == pytest.approx(time.time(), abs=60)
    assert future.now_s() == 4e9


@pytest.mark.parametrize("facts", [None, [], [1, 2], ["a", "b", "c"], 7])
def test_facts_of_another_form_are_no_clock(facts: Any) -> None:
    assert SteadyClock.from_facts(facts) is None


def test_a_clock_is_restored_from_its_facts() -> None:
    clock = SteadyClock.start()
    assert clock.boot == boot_id()
    assert SteadyClock.from_facts(clock.facts) == clock
