"""Arrows between ranks at a sync point."""

from __future__ import annotations

import numpy as np

from traceml.runs.export import flow_arrows
from traceml.runs.export.flow_arrows import FlowArrows

US = 1_000


def arrivals(*rows):
    """Return arrivals of (step, began, arrived, left) in microseconds."""
    table = np.array(rows, np.int64).reshape(-1, 4)
    table[:, 1:] *= US
    return table


def test_the_last_to_come_releases_the_others():
    """The rank that waited least came last; each of the others gets an arrow that ends within its wait."""
    arrows = FlowArrows()
    assert arrows.add_arrivals("wait", 0, arrivals((5, 0, 10, 100)), 3) is None
    assert arrows.add_arrivals("wait", 2, arrivals((5, 0, 50, 101)), 3) is None
    found = arrows.add_arrivals("wait", 1, arrivals((5, 0, 98, 99)), 3)

    assert list(zip(found.source.tolist(), found.target.tolist(), strict=True)) == [(1, 0), (1, 2)]
    assert (found.from_ns > 0).all()
    assert (found.from_ns <= found.to_ns).all()
    assert (np.array([10, 50]) * US <= found.to_ns).all()
    assert (found.to_ns < np.array([100, 101]) * US).all()


def test_no_arrow_back_in_time():
    """There is no arrow if the clocks differ by more than the wait."""
    arrows = FlowArrows()
    arrows.add_arrivals("wait", 0, arrivals((1, 0, 10, 20)), 2)

    assert len(arrows.add_arrivals("wait", 1, arrivals((1, 500, 590, 591)), 2).source) == 0


def test_steps_are_matched_however_they_come():
    """Blocks of any size, with gaps and repeated steps, give one arrow per step that all ranks have."""
    arrows, late = FlowArrows(), (0, 19, 20)
    assert arrows.add_arrivals("wait", 0, arrivals(*((step, 0, 10, 20) for step in (1, 2, 2, 3, 5))), 2) is None
    assert len(arrows.add_arrivals("wait", 1, arrivals((2, *late), (4, *late)), 2).source) == 1
    assert arrows.add_arrivals("wait", 0, arrivals((4, 0, 10, 20)), 2) is None
    assert arrows.add_arrivals("other", 1, arrivals((5, *late)), 2) is None
    assert len(arrows.add_arrivals("wait", 1, arrivals((5, *late), (3, *late)), 2).source) == 3
    assert arrows.add_arrivals("wait", 0, arrivals((6, 0, 10, 20)), 2) is None
    assert [len(rest.source) for rest in arrows.rest()] == [0, 0]


def test_what_is_left_is_matched_at_the_end():
    """The last blocks need not be of the same steps."""
    arrows = FlowArrows()
    arrows.add_arrivals("wait", 0, arrivals((1, 0, 10, 20), (2, 0, 10, 20)), 2)
    arrows.add_arrivals("wait", 1, arrivals((1, 0, 19, 20)), 2)

    assert arrows.add_arrivals("wait", 1, arrivals((2, 0, 19, 20)), 2) is None
    assert [len(rest.source) for rest in arrows.rest()] == [1]


def test_unfinished_meetings_are_given_up(monkeypatch):
    """A rank that is lost does not make the others' meetings pile up; the newest are kept."""
    most = 1000
    monkeypatch.setattr(flow_arrows, "_MAX_HELD", most)
    arrows = FlowArrows()
    steps = np.arange(most + 10)
    everything = np.column_stack([steps, steps * 0, steps * 0 + 10 * US, steps * 0 + 20 * US])
    arrows.add_arrivals("wait", 0, everything, 2)
    arrows.add_arrivals("wait", 1, arrivals((5, 0, 19, 20), (most, 0, 19, 20)), 2)

    assert sum(held.count for held in arrows._held.values()) == most // 2 + 2
    assert [len(rest.source) for rest in arrows.rest()] == [1]
