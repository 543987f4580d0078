"""The scheduler: due times, costs, and samplers that raise."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import ClassVar

import pytest

from traceml.database.schema import EVALS, Table
from traceml.samplers.base import SampleRow, SamplerScheduler


class Counting:
    """Returns one row per sample; raises while `broken`."""

    table: ClassVar[Table] = EVALS
    start_interval_s: ClassVar[float | None] = None

    def __init__(self, name: str = "counting", broken: bool = False) -> None:
        self.name, self.broken, self.closed = name, broken, False  # type: ignore[misc]

    def sample(self, t_ns: int, step: int) -> Iterable[SampleRow]:
        if self.broken:
            raise OSError("no such sensor")

        return [(step, t_ns, 0, 0)]

    def close(self) -> None:
        self.closed = True


def test_only_what_is_due_runs() -> None:
    """A sampler runs at once and then waits for its interval."""
    rows: list[tuple[str, SampleRow]] = []
    scheduler = SamplerScheduler([Counting()], lambda table, row: rows.append((table, row)), interval_s=1000)

    scheduler.run_due(step=3)
    scheduler.run_due(step=4)

    assert [(table, row[0]) for table, row in rows] == [("evals", 3)]
    assert scheduler.statistics()[0].samples == 1


def test_intervals_by_name_and_at_the_start() -> None:
    """sampler_intervals overrides the interval of its sampler, also during the start."""

    class Dense(Counting):
        start_interval_s: ClassVar[float | None] = 0.5

    scheduler = SamplerScheduler(
        [Dense("dense"), Dense("told"), Counting("plain")], lambda _t, _r: None, interval_s=10, intervals_s={"told": 7}
    )

    entries = {entry.sampler.name: entry for entry in scheduler._entries}
    assert (entries["dense"].start_interval_ns, entries["dense"].interval_ns) == (500_000_000, 10_000_000_000)
    assert (entries["told"].start_interval_ns, entries["told"].interval_ns) == (7_000_000_000, 7_000_000_000)
    assert entries["plain"].start_interval_ns == 10_000_000_000


def test_missed_beats_are_not_made_up() -> None:
    """After a long stop a sampler runs once, not once per missed interval."""
    scheduler = SamplerScheduler([Counting()], lambda _t, _r: None, interval_s=1.0)
    scheduler._entries[0].due_ns -= 60 * 10**9

    scheduler.run_due(0)
    scheduler.run_due(0)

    assert scheduler.statistics()[0].samples == 1


def test_samplers_stay_in_step_after_a_stop() -> None:
    """Their intervals are 1,000 and 500 s: every second sample of one falls together with one of the other."""
    scheduler = SamplerScheduler(
        [Counting("a"), Counting("b")], lambda _t, _r: None, interval_s=1000, intervals_s={"b": 500}
    )
    before = scheduler.due_ns
    for entry in scheduler._entries:
        entry.due_ns -= 700 * 10**9

    scheduler.run_due(0)

    assert [entry.due_ns - before for entry in scheduler._entries] == [1300 * 10**9, 300 * 10**9]


def test_a_sampler_that_raises_leaves_the_others_alone(caplog: pytest.LogCaptureFixture) -> None:
    """A failure is logged and reported once, counted each time, and retried."""
    broken, fine = Counting("broken", broken=True), Counting("fine")
    told: list[str] = []
    rows: list[SampleRow] = []
    scheduler = SamplerScheduler(
        [broken, fine], lambda _t, row: rows.append(row), on_error=lambda name, _error: told.append(name)
    )

    with caplog.at_level(logging.WARNING, "traceml"):
        scheduler.run_all(0)
        scheduler.run_all(0)
    broken.broken = False
    scheduler.run_all(0)

    assert len([r for r in caplog.records if "broken" in r.getMessage()]) == 1
    assert told == ["broken"]
    figures = {each.name: (each.samples, each.errors) for each in scheduler.statistics()}
    assert figures == {"broken": (1, 2), "fine": (3, 0)}
    assert scheduler.errors == 2
    assert len(rows) == 4


def test_costs_are_measured() -> None:
    """Each sampler's CPU time is counted, as a total and a maximum."""
    scheduler = SamplerScheduler([Counting()], lambda _t, _r: None)

    scheduler.run_all(0)

    figures = scheduler.statistics()[0]
    assert 0 < figures.max_ns <= figures.total_ns == scheduler.total_ns


def test_close_closes_all() -> None:
    """Closing reaches every sampler and leaves nothing due."""
    samplers = [Counting("a"), Counting("b")]
    scheduler = SamplerScheduler(samplers, lambda _t, _r: None)

    scheduler.close()

    assert all(sampler.closed for sampler in samplers)
    assert scheduler.due_ns == 2**62
