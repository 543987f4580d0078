"""The report's section on trackers."""

from __future__ import annotations

import pytest

from traceml.runs.report.trackers import trackers
from traceml.track.tracker_state import DeliveryPhase, TrackerState


@pytest.mark.parametrize(
    ("phase", "pid", "told"),
    [
        (DeliveryPhase.DELIVERING, 1, "stopped"),  # another program has the id of the killed one by now
        (DeliveryPhase.STARTING, 2**22, "stopped"),  # no process has so large an id
        (DeliveryPhase.STARTING, 0, "starting"),
        (DeliveryPhase.OPEN, 2**22, "open"),
    ],
)
def test_a_delivery_that_was_killed_does_not_go_on(tmp_path, phase, pid, told):
    """It could not write so itself; its rows wait for `traceml sync`."""
    TrackerState("mlflow", phase=phase, pid=pid).save(tmp_path)

    assert [each.state for each in trackers(tmp_path)] == [told]
