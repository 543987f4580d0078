"""Deliveries of an aggregator: what one run announces does not stop those of another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.eventually import eventually
from tests.track.fabricated import LoggedRun, state_of
from traceml.track.delivery.delivery_manager import DeliveryManager
from traceml.track.delivery.delivery_process import DeliveryProcess
from traceml.track.tracker_state import DeliveryPhase

FAULTY = "tests.track.faulty_backends:FaultyBackend"
ROOT = str(Path(__file__).parents[3])


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


@pytest.mark.process
def test_a_library_that_crashes_its_process_is_a_failure(tmp_path: Path) -> None:
    """The process was started again and again; state, report and `traceml sync` said nothing about it."""
    run = LoggedRun(tmp_path / "r1")
    options = {"path": str(tmp_path)}
    run.experiment([FAULTY], id="x", sys_path=[ROOT], options={FAULTY: options})
    run.metrics({"a": [1.0]})
    run.end()
    (tmp_path / "behavior").write_text('{"metrics": "crashes"}')
    process = DeliveryProcess(run.path, FAULTY, options, nice=0, once=True)

    def is_given_up() -> bool:
        process.poll()
        return process.is_given_up

    try:
        eventually(is_given_up)
        assert "the tracker's library was killed by signal 9 (SIGKILL); its output is in" in process.state.error
    finally:
        process.stop()
        process.join()


@pytest.mark.process
def test_a_delivery_that_is_asked_to_end_has_not_crashed(tmp_path: Path) -> None:
    """Before it listens to SIGTERM, it dies of it."""
    run = LoggedRun(tmp_path / "r1")
    run.experiment(["jsonl"])
    process = DeliveryProcess(run.path, "jsonl", {}, nice=0)
    process.poll()
    process.stop()

    def has_ended() -> bool:
        process.poll()
        return process.pid is None

    eventually(has_ended)
    assert (process.state.retries, process.state.error) == (0, "")
