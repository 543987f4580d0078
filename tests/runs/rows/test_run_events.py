"""Events of a run for people."""

from __future__ import annotations

from tests.renderers.reports import finding, straggler
from traceml.database.snapshots import SNAPSHOT
from traceml.database.store.reader import RunEvent
from traceml.diagnosis.facts.core_waits import CORE_TAKERS
from traceml.diagnosis.findings import Finding
from traceml.runs.rows.run_events import RunEvents


def kept(*events: tuple[str, dict]) -> list[tuple[int, str]]:
    of_run = RunEvents()
    for number, (kind, data) in enumerate(events):
        of_run.take(RunEvent(number, 0, kind, data))

    assert len(of_run) == len(list(of_run))
    return [(event.id, event.kind) for event in of_run]


def verdict(of: Finding) -> tuple[str, dict]:
    return "verdict", {"findings": [of.to_dict()]}


def test_readings_displace_nothing():
    """After an hour of readings of the host, the end of a rank is still there, and no reading is."""
    readings = [(CORE_TAKERS, {"cores": {"ffmpeg": 0.8}}), (SNAPSHOT, {"stream": 1})] * 1_200

    assert kept(("rank", {"rank": 0, "state": "failed"}), *readings) == [(0, "rank")]


def test_a_verdict_is_reported_when_it_changes():
    """Another cost is no other verdict; another kind, phase or rank is, also the return of an earlier one."""
    slow = [straggler(), straggler(cost_share=0.5), straggler(phase="backward"), straggler(ranks=[2]), finding()]

    assert [number for number, _ in kept(*map(verdict, [*slow, straggler()]))] == [0, 2, 3, 4, 5]


def test_the_newest_events_stay():
    """Their number is bounded."""
    assert [number for number, _ in kept(*[("alert", {})] * 500)] == list(range(300, 500))
