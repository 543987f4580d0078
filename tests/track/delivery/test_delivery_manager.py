"""Deliveries of an aggregator: what one run announces does not stop those of another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.track.fabricated import LoggedRun, state_of
from traceml.track.delivery.delivery_manager import DeliveryManager
from traceml.track.tracker_state import DeliveryPhase


@pytest.mark.parametrize(
    "row",
    [
        {"backends": ["jsonl"], "options": {"jsonl": {"env": 5}}},
        {"backends": ["jsonl"], "options": 5},
        {"backends": 5},
    ],
)
def test_a_wrong_announcement_raises_nothing(tmp_path: Path, row: dict[str, Any]) -> None:
    """It ended the task that watches all runs of the aggregator, its other deliveries included."""
    run = LoggedRun(tmp_path / "r1")
    run.row("experiment", name="exp", **row)
    run.end()

    manager = DeliveryManager(10.0, 0, profile=False)
    for _ in range(2):
        manager.poll(run.path, ended=True)

    assert [each.run_dir for each in manager.pop_delivered()] == [run.path]
    manager.stop()


def test_a_wrong_option_is_in_the_state(tmp_path: Path) -> None:
    """Report and `traceml sync` show what has to be mended, as for an option that the delivery process refuses."""
    run = LoggedRun(tmp_path / "r1")
    run.experiment(["jsonl"], options={"jsonl": {"env": 5}})
    run.end()

    manager = DeliveryManager(10.0, 0, profile=False)
    manager.poll(run.path, ended=True)

    assert state_of(run.path).phase is DeliveryPhase.BROKEN
    assert "option 'env' of a backend is 5" in state_of(run.path).error
