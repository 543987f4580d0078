"""Live ranks that have not connected to the run of their job."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.aggregator.test_registry import hello, registry  # noqa: F401
from traceml.aggregator.registry import Registry
from traceml.aggregator.unresponsive_ranks.unconnected_ranks import UnconnectedRanks
from traceml.clock import boot_id, process_start_ticks
from traceml.database.flight.flight import FlightFile


@pytest.fixture
def flight(memory: Path, monkeypatch: pytest.MonkeyPatch):
    """The flight file of rank 1, which this process plays."""
    monkeypatch.setattr("traceml.aggregator.unresponsive_ranks.unconnected_ranks.default_folder", lambda: memory)
    pid = os.getpid()
    facts = {"job": "job", "rank": 1, "pid": pid, "start_ticks": process_start_ticks(pid), "boot_id": boot_id()}
    file = FlightFile.create(memory, facts)
    yield file
    file.close(unlink=True)


def test_a_rank_that_joins_a_run_elsewhere_is_not_absent(registry: Registry, flight: FlightFile) -> None:  # noqa: F811
    """A job of the same name has its runs folder; until its rank connects there, nobody can tell them apart."""
    run, _ = registry.assign(hello(0, 2))
    absent = UnconnectedRanks(run)
    assert [process.rank for process in absent.find()] == [1]

    flight.update_identity(run_dir="/others/20260101-a")

    assert absent.find() == []
    assert UnconnectedRanks(run).find() == []


def test_a_rank_that_lost_its_aggregator_is_absent(registry: Registry, flight: FlightFile) -> None:  # noqa: F811
    """The next aggregator of its run knows it by its file only."""
    run, _ = registry.assign(hello(0, 2))

    flight.update_identity(run_dir=str(run.path))

    assert [process.rank for process in UnconnectedRanks(run).find()] == [1]
