"""Changes at the same time as that of the steps."""

from __future__ import annotations

import pytest

from traceml.diagnosis.facts.machine_use import MachineUse
from traceml.diagnosis.rules.slowdowns.coinciding_changes import changes


@pytest.mark.parametrize(
    ("before", "then", "told"),
    [(0.0, 0.11, True), (0.0, 0.09, False), (0.73, 0.80, True), (0.73, 0.75, False), (0.80, 0.73, False)],
)
def test_lost_cores_are_told_where_little_of_them_was_left(before: float, then: float, *, told: bool) -> None:
    """A thread that has its core for 20 % of the time in place of 27 % takes 1.35 times as long."""
    found = changes(MachineUse(waited=before), MachineUse(waited=then))

    assert [each.name for each in found] == ["cpu_wait_share"] * told
