"""Arrows between ranks at a sync point."""

from __future__ import annotations

from traceml.runs.export.flow_arrows import _MOST_HELD, FlowArrows, SyncArrival

US = 1_000


def arrival(rank, began, arrived, left):
    return SyncArrival(rank + 1, 10 * (rank + 1), began * US, arrived * US, left * US)


def test_the_last_to_come_releases_the_others():
    """Who waited least came last; each of the others gets an arrow that ends within its wait."""
    arrows = FlowArrows()
    assert arrows.add_arrival(5, 0, arrival(0, 0, 10, 100), 3) == []
    assert arrows.add_arrival(5, 2, arrival(2, 0, 50, 101), 3) == []
    found = arrows.add_arrival(5, 1, arrival(1, 0, 98, 99), 3)

    assert [(arrow.source.pid, arrow.target.pid) for arrow in found] == [(2, 1), (2, 3)]
    for arrow in found:
        assert arrow.source.began_ns < arrow.from_ns <= arrow.to_ns
        assert arrow.target.arrived_ns <= arrow.to_ns < arrow.target.left_ns


def test_no_arrow_back_in_time():
    """There is no arrow if the clocks differ by more than the wait."""
    arrows = FlowArrows()
    arrows.add_arrival(1, 0, arrival(0, 0, 10, 20), 2)

    assert arrows.add_arrival(1, 1, arrival(1, 500, 590, 591), 2) == []


def test_unfinished_meetings_are_given_up():
    """A rank that is lost does not make the others' meetings pile up."""
    arrows = FlowArrows()
    for step in range(_MOST_HELD + 10):
        arrows.add_arrival(step, 0, arrival(0, 0, 10, 20), 2)

    assert arrows._held == _MOST_HELD
    assert arrows.add_arrival(5, 1, arrival(1, 0, 19, 20), 2) == []
    assert len(arrows.add_arrival(_MOST_HELD, 1, arrival(1, 0, 19, 20), 2)) == 1
