"""Stopped time is taken from the part of the run's time in which it was."""

from __future__ import annotations

import pytest

from traceml.diagnosis.facts.wall_parts import Stop, stop_of, without_stops

PARTS = {"startup": 5.0, "steps": 20.0, "evaluation": 1.0, "between_epochs": 2.0, "idle": 4.0}


@pytest.mark.parametrize(
    ("stops", "changed"),
    [
        ([Stop(8.0, "steps")], {"steps": 12.0, "stopped": 8.0}),
        ([Stop(2.0, "startup"), Stop(3.0, "steps")], {"startup": 3.0, "steps": 17.0, "stopped": 5.0}),
        ([Stop(3.0, "outside")], {"evaluation": 0.0, "idle": 2.0, "stopped": 3.0}),
        ([Stop(9.0, "outside")], {"evaluation": 0.0, "idle": 0.0, "between_epochs": 0.0, "stopped": 7.0}),
        ([Stop(30.0, "steps")], {"steps": 0.0, "between_epochs": 0.0, "stopped": 22.0}),
        ([], {"stopped": 0.0}),
    ],
)
def test_parts_still_add_up(stops: list[Stop], changed: dict[str, float]) -> None:
    """No part becomes negative, and nothing is counted twice."""
    found = without_stops(PARTS, stops)

    assert found == {**PARTS, "stopped": 0.0, **changed}
    assert sum(found.values()) == pytest.approx(sum(PARTS.values()))


@pytest.mark.parametrize("row", [{}, {"seconds": "3", "part": "steps"}, {"seconds": 3.0, "part": "elsewhere"}])
def test_rows_that_are_none(row: dict[str, object]) -> None:
    """A row of another version is left out."""
    assert stop_of(row) is None
