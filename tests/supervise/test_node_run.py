"""The run that the nodes of a job agree on: the rules, and real nodes under torchrun."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

from tests.eventually import eventually
from tests.launch.conftest import hosts  # noqa: F401 - a fixture
from tests.launch.hosts import Host, Hosts
from traceml.errors import AggregatorRefusedError, AggregatorUnavailableError
from traceml.supervise import aggregator_client
from traceml.supervise.node_run import NodeRun, NodeRunReport

OWN = {"TRACEML_ADDRESS": "127.0.0.1:1000", "TRACEML_TOKEN": "own", "TRACEML_RUN_ID": "own-run"}
FIRST = {"TRACEML_ADDRESS": "127.0.0.1:2000", "TRACEML_TOKEN": "first", "TRACEML_RUN_ID": "first-run"}


class Node:
    """A node of a job in this process, and the reports of its rendezvous."""

    def __init__(self, variables: dict[str, str], *, shows_token: bool = True) -> None:
        self.environ = dict(variables)
        self.reports: list[NodeRunReport] = []
        self.run = NodeRun(self.environ, self.reports.append, shows_token=shows_token)

    def meet(self, store: HashStore, node: int, nodes: int = 2) -> None:
        self.run.agree(store, node, nodes, "127.0.0.1")


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """Answers of aggregators by port: a run's folder, or an error."""
    answers: dict[int, Any] = {}

    class Connection:
        def __init__(self, answer: str) -> None:
            self.answer = answer

        def request(self, name: str, *_: object, **__: object) -> dict[str, str]:
            assert name == "join"
            return {"run_dir": self.answer}

        def close(self) -> None:
            pass

    def connect(self: aggregator_client.AggregatorClient, *_: object, **__: object) -> Connection:
        answer = answers.get(self.port)
        if answer is None:
            raise AggregatorUnavailableError(self.host, self.port, 1.0, "nobody listens")
        if isinstance(answer, Exception):
            raise answer

        return Connection(answer)

    monkeypatch.setattr(aggregator_client.AggregatorClient, "connect", connect)
    return answers


def test_ranks_of_the_second_node_send_to_the_first(reached: dict[int, Any]) -> None:
    """They find the aggregator of the first node, and prove its token."""
    reached[2000] = "/runs/first-run"
    first, second, store = Node(FIRST), Node(OWN), HashStore()
    first.meet(store, 0)
    second.meet(store, 1)

    assert first.environ == FIRST
    assert first.reports == [NodeRunReport()]
    assert second.environ["TRACEML_ADDRESS"].endswith(":2000")
    assert {**second.environ, "TRACEML_ADDRESS": ""} == {**FIRST, "TRACEML_ADDRESS": ""}
    (report,) = second.reports
    assert report.location is not None
    assert (report.location.node, report.run_dir) == (socket.gethostname(), "/runs/first-run")


def test_a_token_that_all_nodes_were_given_is_not_shown(reached: dict[int, Any]) -> None:
    """The store in which torchrun's agents meet has no authentication."""
    reached[2000] = "/runs/first-run"
    first, second, store = Node(FIRST, shows_token=False), Node({**OWN, "TRACEML_TOKEN": "first"}), HashStore()
    first.meet(store, 0)
    second.meet(store, 1)

    assert b"first-run" in store.get("traceml/run")
    assert b'"first"' not in store.get("traceml/run")
    assert second.environ["TRACEML_RUN_ID"] == "first-run"


@pytest.mark.parametrize("answer", [None, AggregatorRefusedError("10.0.0.1", 2000, "wrong token")])
def test_a_run_that_cannot_be_joined_is_named(
    reached: dict[int, Any], answer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The node's ranks are a run of their own, as they would be without the first node."""
    reached[2000] = answer
    first, second, store = Node(FIRST), Node(OWN), HashStore()
    first.meet(store, 0)
    second.meet(store, 1)

    assert (second.environ, second.reports) == (OWN, [NodeRunReport()])
    printed = capsys.readouterr().err
    assert printed.startswith(f"traceml: the ranks of this node are a run of their own: that of {socket.gethostname()}")
    assert ("nobody listens" if answer is None else "wrong token") in printed


def test_a_first_node_without_traceml_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It names no run."""
    monkeypatch.setattr("traceml.supervise.node_run._CHOICE", timedelta(milliseconds=50))
    second = Node(OWN)
    second.meet(HashStore(), 1)

    assert (second.environ, second.reports) == (OWN, [NodeRunReport()])


def test_one_node_has_its_own_run() -> None:
    """Also where more may come."""
    node = Node(OWN)
    node.meet(HashStore(), 0, 1)

    assert (node.environ, node.reports) == (OWN, [NodeRunReport()])


def test_the_run_that_has_begun_is_kept(reached: dict[int, Any]) -> None:
    """Each rendezvous has a store of its own, and may number the nodes anew."""
    reached[2000] = "/runs/first-run"
    first, second, third, store = Node(FIRST), Node(OWN), Node({**OWN, "TRACEML_RUN_ID": "third"}), HashStore()
    first.meet(store, 0)
    second.meet(store, 1)
    store = HashStore()
    for node in (second, first, third):
        node.run.claim(store)

    third.meet(store, 0, 3)
    second.meet(store, 1, 3)
    first.meet(store, 2, 3)

    assert {node.environ["TRACEML_RUN_ID"] for node in (first, second, third)} == {"first-run"}


def test_a_node_whose_run_is_gone_begins_its_own(reached: dict[int, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """The node that had it has left the job: the others go on."""
    reached[2000] = "/runs/first-run"
    first, second, store = Node(FIRST), Node(OWN), HashStore()
    first.meet(store, 0)
    second.meet(store, 1)
    reached.clear()
    store = HashStore()
    second.run.claim(store)
    second.meet(store, 0, 1)

    assert (second.environ, second.reports[-1]) == (OWN, NodeRunReport())


# --- real nodes -------------------------------------------------------------------------------------------------------

TRAIN = """
import ctypes, os, sys, time, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo")
rank = dist.get_rank()
model = DistributedDataParallel(torch.nn.Linear(8, 8))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(60):
    if rank == 1:
        time.sleep(0.02)
    while rank == 1 and step == 40 and "asked" in sys.argv and not os.path.exists(sys.argv[2]):
        time.sleep(0.01)
    model(torch.randn(4, 8)).sum().backward()
    if rank == 1 and step == 40 and "killed" in sys.argv:
        os.kill(os.getpid(), 9)
    optimizer.step()
    optimizer.zero_grad()
    if rank == 1 and step == 40 and "stuck" in sys.argv:
        ctypes.PyDLL(None).open(sys.argv[2].encode(), os.O_RDONLY)  # with the GIL, until somebody writes
dist.destroy_process_group()
"""


ENVIRON = {"OMP_NUM_THREADS": "1", "TRACEML_HANG_TIMEOUT": "6"}


@contextmanager
def started(
    hosts: Hosts,  # noqa: F811
    folder: Path,
    words: Sequence[str],
    *,
    way: str,
    options: Sequence[str] = (),
) -> Iterator[list[subprocess.Popen[str]]]:
    """Start the script on node1 and node2 by `traceml run`, one rank on each."""
    script, first = folder / "train.py", hosts.all[1]
    script.write_text(TRAIN)

    def start(number: int, host: Host) -> subprocess.Popen[str]:
        meeting = (
            ("--master-addr", first.address, "--master-port", "29555", "--node-rank", str(number))
            if way == "static"
            else ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{first.address}:29556", "--rdzv-id", folder.name)
        )
        command = [
            sys.executable,
            "-m",
            "traceml",
            "run",
            "--runs-dir",
            folder / host.name,
            *options,
            "--nnodes",
            "2",
            *meeting,
        ]
        return host.start(*command, script, *words, env=ENVIRON, forks=True)

    commands = [start(number, host) for number, host in enumerate(hosts.all[1:3])]
    try:
        yield commands
    finally:
        for each in commands:
            each.kill()


def run_of(hosts: Hosts, folder: Path, *words: str, way: str = "static") -> tuple[list[int], list[str], dict[str, Any]]:  # noqa: F811
    """Run the script on two nodes; return the statuses and outputs of the commands, and the report of the only run."""
    with started(hosts, folder, words, way=way) as commands:
        outputs = [each.communicate(timeout=200)[1] for each in commands]

    (report,) = folder.glob("node*/*-train-*/report.json")
    return [each.returncode for each in commands], outputs, json.loads(report.read_text())


@pytest.mark.process
def test_two_nodes_are_one_run(hosts: Hosts, tmp_path: Path) -> None:  # noqa: F811
    """The late rank of the second node is named, with its line, by the verdict of the first."""
    statuses, outputs, report = run_of(hosts, tmp_path)

    assert statuses == [0, 0], outputs
    assert [(rank["rank"], rank["host"], rank["steps"]) for rank in report["ranks"]] == [
        (0, "node1", 60),
        (1, "node2", 60),
    ]
    (straggler,) = [each for each in report["findings"] if each["kind"] == "STRAGGLER"]
    assert (straggler["ranks"], straggler["evidence"]["line"]) == ([1], 10)
    (joined,) = [output for output in outputs if "the ranks of this node are part of the run of node" in output]
    assert "STRAGGLER" not in joined
    assert report["telemetry"]["rows_lost"] == 0


@pytest.mark.process
def test_a_rank_that_is_killed_on_the_other_node_loses_nothing(hosts: Hosts, tmp_path: Path) -> None:  # noqa: F811
    """Its last rows, its open step and the signal come from its node; its flight file is not left there."""
    statuses, outputs, report = run_of(hosts, tmp_path, "killed", way="c10d")

    assert sorted(statuses) == [1, 128 + signal.SIGKILL], outputs
    (killed,) = [rank for rank in report["ranks"] if rank["state"] == "killed"]
    assert (killed["rank"], killed["exit"]["last_step"], killed["exit"]["signal"]) == (1, 39, signal.SIGKILL)
    assert report["findings"][0]["kind"] == "RANK_LOST"
    assert report["telemetry"]["rows_lost"] == 0


@pytest.mark.process
def test_a_rank_that_is_stuck_in_c_on_the_other_node_is_named(hosts: Hosts, tmp_path: Path) -> None:  # noqa: F811
    """Its recorder cannot answer: the node's `traceml run` takes its stack from outside."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with started(hosts, tmp_path, ("stuck", str(pipe)), way="static") as commands:
        assert commands[0].stderr is not None
        told = next(line for line in commands[0].stderr if "traceml: HANG" in line)
        pipe.write_text("go on")
        outputs = [each.communicate(timeout=200)[1] for each in commands]

    assert [each.returncode for each in commands] == [0, 0], outputs
    assert "traceml: HANG: Rank 1 blocks the others, in train.py:19" in told


@pytest.mark.process
def test_commands_on_the_other_node_show_or_name_the_run(hosts: Hosts, tmp_path: Path) -> None:  # noqa: F811
    """Stacks come from the first node; its store is there, so other commands and the page are."""
    asked, node2 = tmp_path / "asked", hosts.all[2]
    traceml = (sys.executable, "-m", "traceml")
    with started(hosts, tmp_path, ("asked", str(asked)), way="static", options=("--live", "web")) as commands:
        stacks = eventually(
            lambda: _stacks_of_both(node2.run(*traceml, "stacks", "--json", check=False, env=ENVIRON, forks=True)),
            "stacks",
        )
        top = node2.run(*traceml, "top", "--json", check=False, env=ENVIRON, forks=True)
        asked.touch()
        outputs = [each.communicate(timeout=200)[1] for each in commands]

    (run_dir,) = tmp_path.glob("node1/*-train-*")
    assert stacks["run"] == run_dir.name
    assert f"part of run {run_dir.name} of node1: run this command there, for {run_dir}" in top.stderr
    assert f"the page is at http://127.0.0.1:29766/run/{run_dir.name}" in outputs[0]
    assert "the page is at" not in outputs[1]
    assert f"{run_dir}; live: `traceml top` on node1, `traceml stacks` also here; no page is opened here" in outputs[1]


def _stacks_of_both(answer: subprocess.CompletedProcess[str]) -> dict[str, Any] | None:
    """Return the answer of `traceml stacks --json` once it has both ranks."""
    document = json.loads(answer.stdout) if answer.returncode == 0 else {"ranks": []}
    return document if len(document["ranks"]) == 2 else None
