"""Guards of rare actions: what one of them raises is counted, and the next one runs."""

from __future__ import annotations

import logging

import pytest

from tests.instrument.conftest import Traced
from traceml.instrument.guard import Guard, guarded


class Reporting:
    """A part of the instrumentation with a guarded method."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.halves: list[float] = []

    @guarded
    def add_part(self, whole: float, *, parts: int) -> None:
        self.halves.append(whole / parts)


def test_an_error_costs_only_its_action(traced: Traced, caplog: pytest.LogCaptureFixture) -> None:
    """By a method, by a call and by a function that is passed on."""
    clock = traced.instrumentation.clock
    reporting = Reporting(Guard(clock))
    with caplog.at_level(logging.CRITICAL, "traceml"):
        for parts in (0, 2):
            reporting.add_part(3.0, parts=parts)

        reporting.guard([1.0].index, 2.0)
        reporting.guard.wrap(reporting.halves.append)(1.0)

    assert reporting.halves == [1.5, 1.0]
    assert clock.errors == 2


def test_a_guarded_method_lets_through_what_ends_the_script(traced: Traced) -> None:
    """Ctrl-C in an action of ours is the script's."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Guard(traced.instrumentation.clock)(interrupt)

    assert traced.instrumentation.clock.errors == 0
