"""Reports of a node about its part in the run of another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from traceml.supervise.aggregator_client import AggregatorClient
from traceml.supervise.joined_run import JoinedRun
from traceml.supervise.node_run import NodeRunReport, RunLocation
from traceml.transport import auth
from traceml.transport.client import ClockOffset
from traceml.transport.exit_report import ExitReport


class Connection:
    """A connection to an aggregator whose clock is half an hour ahead of ours."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def measure_clock(self, *, is_sent: bool) -> ClockOffset:
        assert not is_sent  # a client that sends it is refused
        return ClockOffset(0, 0, 1_800_000_000_000)

    def request(self, name: str, args: dict[str, Any], **_: object) -> dict[str, Any]:
        self.asked.append((name, args))
        return {}

    def close(self) -> None:
        pass


@pytest.fixture
def connection(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Connection:
    """The connection to the aggregator of the first node."""
    made = Connection()
    monkeypatch.setattr(AggregatorClient, "connect", lambda *_, **__: made)
    monkeypatch.setattr(auth, "_candidates", lambda: [tmp_path / "tokens"])
    return made


def joined(folder: Path) -> JoinedRun:
    location = RunLocation(run_id="run-1", node="node1", hosts=["10.0.0.1"], port=1)
    return JoinedRun(NodeRunReport(location=location, host="10.0.0.1", token="t", run_dir="/runs/run-1"), folder)


def test_times_are_those_of_the_clock_of_the_run(connection: Connection, tmp_path: Path) -> None:
    """Else the end of a rank here is before or after all that happens on the first node."""
    run = joined(tmp_path)
    run.finish([ExitReport(rank=1, pid=9, exitcode=1, time=1000.0)], {"signal": 15, "time": 1000.5})

    (exits, told), (leave, left) = connection.asked
    assert (exits, leave) == ("exits", "leave")
    assert told["exits"][0]["time"] == 2800.0
    assert left["ended_by"] == {"signal": 15, "time": 2800.5}


def test_commands_find_the_run_until_its_part_here_has_ended(connection: Connection, tmp_path: Path) -> None:
    """`traceml stacks` of this node asks that aggregator."""
    run = joined(tmp_path)
    assert [(each.node, each.host, each.run_id) for each in auth.joined_runs()] == [("node1", "10.0.0.1", "run-1")]

    run.finish([], None)
    assert auth.joined_runs() == []
    assert [name for name, _ in connection.asked] == ["leave"]
