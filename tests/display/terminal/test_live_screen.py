"""The screen of a job that this process runs."""

from __future__ import annotations

import logging

import pytest

from tests.renderers.reports import slow_rank
from traceml.display.terminal.live_screen import LiveScreen
from traceml.errors import StoreError
from traceml.runs.report.report_types import Report


class FakeRun:
    """A run that is followed; each refresh costs `cost_s` on the test's clock."""

    def __init__(self, now: list[float], cost_s: float = 0.0) -> None:
        self.now, self.cost_s = now, cost_s
        self.rates = [1.0, 2.0]
        self.told: Report | Exception = Report.empty("x")
        self.refreshed = 0
        self.closed = False

    def refresh(self) -> bool:
        self.refreshed += 1
        self.now[0] += self.cost_s
        if isinstance(self.told, Exception):
            raise self.told

        return True

    def report(self) -> Report:
        return self.told

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def made(terminal, tmp_path):
    now = [0.0]
    run = FakeRun(now)
    screen = LiveScreen(tmp_path, console=terminal.console(), follow=lambda path: run, clock=lambda: now[0])
    yield screen, run, now
    screen.close()


def test_nothing_is_drawn_before_there_is_a_run(terminal, made):
    """Until the store exists the script has the whole terminal."""
    screen, run, now = made
    screen.tick()
    screen.write(b"hello\n")

    assert terminal.read() == b"hello\n"

    run.told = slow_rank()
    now[0] += 1
    screen.tick()
    assert "Rank 1 is slow in forward" in "\n".join(terminal.visible_lines())


def test_ticks_are_cheap_between_draws(made):
    """A tick before a draw is due reads nothing."""
    screen, run, now = made
    for _ in range(100):
        screen.tick()
        now[0] += 0.01

    assert run.refreshed == 2


def test_slow_reading_is_done_less_often(made):
    """Slow reading takes at most a twentieth of the time."""
    screen, run, now = made
    run.cost_s = 1.0
    for _ in range(1000):
        screen.tick()
        now[0] += 0.1

    assert run.refreshed <= 6


@pytest.mark.parametrize("error", [StoreError("the store is damaged"), RuntimeError("a bug")])
def test_run_that_cannot_be_read_loses_its_view_only(terminal, made, caplog, error):
    """When reading fails the view ends with one message, and the script's output still passes."""
    screen, run, now = made
    run.told = slow_rank()
    screen.tick()
    run.told = error
    with caplog.at_level(logging.WARNING, logger="traceml"):
        for _ in range(5):
            now[0] += 1
            screen.tick()

    screen.write(b"goes on\n")

    assert run.closed
    assert run.refreshed == 2
    assert sum("the live view ended" in record.getMessage() for record in caplog.records) == 1
    shown = terminal.visible_lines()
    assert "goes on" in shown
    assert not any("traceml" in line for line in shown)
