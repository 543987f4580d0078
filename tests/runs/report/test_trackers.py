"""The report's section on trackers."""

from __future__ import annotations

import pytest

from tests.track.fabricated import LoggedRun
from traceml.database.store.reader import StoreReader
from traceml.run_folder import STORE_NAME
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


def test_a_tracker_that_does_not_exist_is_broken(tmp_path):
    """Whether or not its process has come so far to say it; one that the run has registered is found there."""
    logged = LoggedRun(tmp_path / "run")
    logged.experiment(["nope", "jsonl", "mine", "package:Class"], registered={"mine": "package:Mine"})
    logged.metrics({"loss": [1.0, 2.0]})
    logged.end()

    with StoreReader(tmp_path / "run" / STORE_NAME) as reader:
        found = {each.backend: each for each in trackers(tmp_path / "run", reader)}

    assert {name: each.state for name, each in found.items()} == {
        "nope": "broken", "jsonl": "starting", "mine": "starting", "package:Class": "starting",
    }  # fmt: skip
    assert found["nope"].error.startswith("PluginError: there is no tracker 'nope'. Available: aim, ")
