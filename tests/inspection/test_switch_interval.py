"""Other threads that compute beside the training."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from traceml.inspection import switch_interval
from traceml.inspection.switch_interval import BusyThreads, OtherThreads

SECOND = 10**9


def test_what_threads_have_used_is_told_once_and_never_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The question whether they are busy is asked after each look, on a busy machine much later: it is no look."""
    now_ns, used_ns = [SECOND], {7: 0}
    monkeypatch.setattr(switch_interval, "time", SimpleNamespace(monotonic_ns=lambda: now_ns[0]))
    monkeypatch.setattr(switch_interval, "python_threads_ns", lambda: dict(used_ns))
    others = OtherThreads()
    assert others.check(training=1) is None
    assert not others.are_busy
    told = []
    for _ in range(2):
        now_ns[0] += 3 * SECOND
        used_ns[7] += SECOND
        assert others.are_busy == bool(told)
        told.append(others.check(training=1))

    assert told == [BusyThreads(busiest=7, passed_ns=3 * SECOND, cpu_ns=SECOND)] * 2
