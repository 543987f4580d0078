"""The run's wall time by part."""

from __future__ import annotations

import pytest

from traceml.diagnosis.facts.run_time import PARTS, RunTime


@pytest.mark.parametrize(
    "known",
    [{}, {"startup": 3.0, "steps": 6.0}, {"startup": 3.0, "steps": 9.0, "idle": 1.0}, {"idle": -2.0, "steps": 4.0}],
)
def test_the_parts_add_up(known):
    """What is not known is unexplained; what exceeds the wall time, as clocks differ, is cut."""
    time = RunTime.of(10.0, known)

    assert sum(time.seconds.values()) == pytest.approx(10.0)
    assert set(time.seconds) == set(PARTS)
    assert min(time.seconds.values()) >= 0
