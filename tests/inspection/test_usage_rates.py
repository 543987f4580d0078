"""Rates of use between two readings of a process."""

from __future__ import annotations

import pytest

from traceml.inspection import kernel_state
from traceml.inspection.kernel_state import UsageRates


def test_rates_are_of_the_time_between_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first reading and one too soon give none; idle bytes and processes that have ended take nothing away."""
    uses = iter(((1.0, 500), (1.0, 500), (2.0, 2500), (0.5, 2600)))
    idle_bytes, times_s = iter((0, 0, 1000, 1000)), iter((10.0, 10.05, 12.05, 13.05))
    monkeypatch.setattr(kernel_state, "tree_usage", lambda _: next(uses))
    monkeypatch.setattr(kernel_state.time, "monotonic", lambda: next(times_s))

    rates = UsageRates(7, lambda: next(idle_bytes))

    assert [rates.read() for _ in range(4)] == [(None, None), (None, None), (0.5, 500.0), (0.0, 100.0)]
