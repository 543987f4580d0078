"""Which aggregator stores a job: that of its runs folder, or the one whose address was given."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.aggregator.conftest import TOKEN, Serving
from tests.eventually import eventually
from tests.forked import client as forked
from tests.recorder.conftest import environ
from traceml.database.store.reader import StoreReader
from traceml.errors import AggregatorRefusedError, AggregatorUnavailableError
from traceml.recorder.sending.dialing import dial, stored_elsewhere
from traceml.run_folder import AGGREGATOR_LOG, STORE_NAME
from traceml.settings import load
from traceml.transport.client import Connection
from traceml.transport.folder_aggregator import address_of
from traceml.transport.hello import Hello

pytestmark = pytest.mark.process

# Says where it is recorded, and goes on when it is told to.
SCRIPT = """
import json, os, sys, traceml
recorder = traceml.init(**json.loads(sys.argv[1]))
def steps():
    for _ in range(10):
        with traceml.trace_step():
            pass
steps()
print(json.dumps({"address": recorder.address, "run_dir": str(recorder.run_dir)}), flush=True)
input()
steps()
"""

# The same for a script that only logs: the first call starts a recorder.
LOGGING = """
import json, time, traceml
from traceml.recorder.current_recorder import current_recorder
traceml.log_metric("loss", 1.0)
while current_recorder().run_dir is None:
    time.sleep(0.01)
print(json.dumps({"address": current_recorder().address, "run_dir": str(current_recorder().run_dir)}), flush=True)
input()
"""


class Script:
    """A traced script in a folder of its own, without a given address."""

    def __init__(self, folder: Path, code: str = SCRIPT, environment: dict[str, str] | None = None, **settings: Any):
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self._process = forked.Popen(
            [sys.executable, "-c", code, json.dumps(settings)],
            imports="aggregator",
            forks=True,
            cwd=folder,
            env=environ(folder, **(environment or {})),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._where: dict[str, str] = {}

    @property
    def where(self) -> dict[str, str]:
        """Address and run folder, as the script says."""
        if not self._where:
            assert self._process.stdout is not None
            line = self._process.stdout.readline()
            assert line, self._process.communicate()[1]
            self._where = json.loads(line)

        return self._where

    @property
    def run_dir(self) -> Path:
        return Path(self.where["run_dir"])

    def end(self) -> str:
        """Let it end; return its standard error."""
        _ = self.where
        _, err = self._process.communicate("\n", timeout=240)
        assert self._process.returncode == 0, err
        return err

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def script() -> Iterator[Callable[..., Script]]:
    started: list[Script] = []

    def start(*arguments: Any, **settings: Any) -> Script:
        started.append(Script(*arguments, **settings))
        return started[-1]

    yield start
    for each in started:
        each.kill()


def runs_in(folder: Path) -> list[Path]:
    return sorted((folder / "traceml_runs").glob("2*"))


def stored_steps(run_dir: Path) -> int:
    with StoreReader(run_dir / STORE_NAME) as store:
        return store.stored("steps")


def state_of(run_dir: Path) -> str:
    with StoreReader(run_dir / STORE_NAME) as store:
        return str(store.meta()["run"]["state"])


def aggregator_of(run_dir: Path) -> int:
    def told() -> int:
        with StoreReader(run_dir / STORE_NAME) as store:
            return int(store.meta().get("aggregator", {}).get("pid", 0))

    return int(eventually(told))


def report_of(run_dir: Path) -> dict[str, Any]:
    eventually((run_dir / "report.json").exists)
    report: dict[str, Any] = json.loads((run_dir / "report.json").read_text())
    return report


@pytest.mark.parametrize("code", [SCRIPT, LOGGING])
def test_each_folder_has_its_own_aggregator(tmp_path: Path, script: Callable[..., Script], code: str) -> None:
    """Two scripts at once, in two folders: each run is where it belongs, and outlives the other's aggregator."""
    a = script(tmp_path / "a", local=True)
    assert a.run_dir.parent == tmp_path / "a" / "traceml_runs"
    b = script(tmp_path / "b", code, local=True)
    assert b.run_dir.parent == tmp_path / "b" / "traceml_runs"
    assert a.where["address"] != b.where["address"]

    os.kill(aggregator_of(a.run_dir), signal.SIGTERM)
    a.kill()

    assert b.end() == ""
    assert runs_in(tmp_path / "b") == [b.run_dir]
    assert report_of(b.run_dir)["run"]["state"] == "finished"


def test_jobs_of_one_folder_share_an_aggregator(tmp_path: Path, script: Callable[..., Script]) -> None:
    """Two that start at once make one, and two runs; a later job is a third."""
    jobs = [script(tmp_path / "a", local=True) for _ in range(2)]

    assert jobs[0].where["address"] == jobs[1].where["address"]
    assert aggregator_of(jobs[0].run_dir) == aggregator_of(jobs[1].run_dir)
    assert [job.end() for job in jobs] == ["", ""]
    assert runs_in(tmp_path / "a") == sorted(job.run_dir for job in jobs)

    third = script(tmp_path / "a", local=True)
    third.end()
    assert all(report_of(run_dir)["steps"]["count"] == 20 for run_dir in runs_in(tmp_path / "a"))
    assert len(runs_in(tmp_path / "a")) == 3


def test_ranks_of_a_job_meet_without_an_address(tmp_path: Path, script: Callable[..., Script]) -> None:
    """Four ranks at once: one aggregator, one run."""
    launcher = {"WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "a-job", "MASTER_PORT": "1"}
    ranks = [
        script(tmp_path / "job", SCRIPT, {**launcher, "RANK": str(rank), "LOCAL_RANK": str(rank)}, local=True)
        for rank in range(4)
    ]

    assert {rank.where["address"] for rank in ranks} == {ranks[0].where["address"]}
    assert [rank.end() for rank in ranks] == [""] * 4
    (run_dir,) = runs_in(tmp_path / "job")
    eventually(lambda: state_of(run_dir) == "finished")
    assert stored_steps(run_dir) == 80


def test_killed_aggregator_is_replaced(tmp_path: Path, script: Callable[..., Script]) -> None:
    """Its file tells an address where nobody listens; the rank starts another one, and loses nothing."""
    job = script(tmp_path / "a", local=True)
    eventually(lambda: stored_steps(job.run_dir) == 10)
    os.kill(aggregator_of(job.run_dir), signal.SIGKILL)

    job.end()

    assert runs_in(tmp_path / "a") == [job.run_dir]
    assert report_of(job.run_dir)["steps"]["count"] == 20


def test_init_finds_the_aggregator_that_serves_the_folder(tmp_path: Path, script: Callable[..., Script]) -> None:
    """`traceml serve` may listen on any port; neither port nor token is set for the script."""
    (tmp_path / "a").mkdir()
    server = Serving(tmp_path / "a" / "traceml_runs", tmp_path / "log")
    try:
        job = script(tmp_path / "a")

        assert job.where["address"] == f"127.0.0.1:{server.port}"
        assert job.end() == ""
        assert runs_in(tmp_path / "a") == [job.run_dir]
    finally:
        server.close()

    assert address_of(tmp_path / "a" / "traceml_runs", 1) is None


def test_given_address_may_have_another_folder_and_is_reported(tmp_path: Path, script: Callable[..., Script]) -> None:
    """The run is where the aggregator's runs are, and one line says so."""
    server = Serving(tmp_path / "shared", tmp_path / "log")
    try:
        job = script(tmp_path / "a", SCRIPT, {"TRACEML_PORT": str(server.port)})
        err = job.end()
    finally:
        server.close()

    assert job.run_dir.parent == tmp_path / "shared"
    (line,) = err.splitlines()
    assert line.startswith(f"this run is stored in {job.run_dir}, by the aggregator at 127.0.0.1:{server.port} that")
    assert line.endswith(f"not in the runs_dir {tmp_path / 'a' / 'traceml_runs'}")


def test_encrypted_jobs_find_an_encrypting_aggregator(tmp_path: Path, script: Callable[..., Script]) -> None:
    """The one that a job starts encrypts too. The folder's file tells that it does; who has only its port is told."""
    server = Serving(tmp_path / "served" / "traceml_runs", tmp_path / "log", tls=True)

    try:
        for job in (script(tmp_path / "served"), script(tmp_path / "alone", tls=True, local=True)):
            host, port = job.where["address"].split(":")
            with pytest.raises(AggregatorUnavailableError, match="TRACEML_TLS"):
                Connection.connect(host, int(port), Hello(), TOKEN, timeout_s=60)

            assert job.end() == ""
            assert report_of(job.run_dir)["steps"]["count"] == 20
    finally:
        server.close()


def test_aggregator_refuses_a_job_of_another_folder(tmp_path: Path) -> None:
    """It does so before it makes a run of it; the text says what to do."""
    server = Serving(tmp_path / "runs", tmp_path / "log")
    try:
        for wanted in (tmp_path, tmp_path / "none"):
            with pytest.raises(AggregatorRefusedError, match="TRACEML_RUNS_DIR="):
                server.rank(runs_dir=str(wanted))

        assert server.run_dirs == []
        link = tmp_path / "link"
        link.symlink_to(server.folder)
        server.rank(runs_dir=str(link)).close("finished")
    finally:
        server.close()


def test_second_aggregator_of_a_folder_says_who_has_it(tmp_path: Path) -> None:
    """It serves those who are given its address."""
    first = Serving(tmp_path / "runs", tmp_path / "first.log")
    second = forked.Popen(
        [sys.executable, "-m", "traceml", "serve", "--port", "0", "--runs-dir", str(first.folder)],
        imports="aggregator",
        env=environ(tmp_path, TRACEML_TOKEN=TOKEN), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert second.stdout is not None
        assert second.stdout.readline().startswith("traceml aggregator at ")
        second.terminate()
        assert f"has an aggregator already, at 127.0.0.1:{first.port}" in second.communicate()[1]
        told = address_of(first.folder, 1)
        assert told is not None
        assert told.port == first.port
    finally:
        second.kill()
        first.close()


def test_where_a_run_is_stored(tmp_path: Path) -> None:
    """The same folder under another name is no other folder; another host's path is told with its host."""
    runs_dir = tmp_path / "runs"
    (runs_dir / "run").mkdir(parents=True)
    (tmp_path / "link").symlink_to(runs_dir)
    config = load({}, tmp_path, runs_dir=runs_dir)

    assert stored_elsewhere(config, {"run_dir": str(runs_dir / "run")}) == ""
    assert stored_elsewhere(config, {"run_dir": str(tmp_path / "link" / "run")}) == ""
    assert stored_elsewhere(config, {}) == ""
    assert stored_elsewhere(config, {"run_dir": "/far/run"}) == "/far/run, on the host of that aggregator"
    supervised = load({"TRACEML_ADDRESS": "127.0.0.1:1"}, tmp_path, runs_dir=runs_dir)
    assert stored_elsewhere(supervised, {"run_dir": "/far/run"}) == ""


@pytest.mark.parametrize("log", ["", "traceml serve: cannot create the run's store: disk I/O error.\n"])
def test_a_launcher_without_its_aggregator_is_no_unknown_program(
    log: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its socket takes the connection; the log of the aggregator that has ended may have the cause."""
    path = tmp_path / "run-1" / AGGREGATOR_LOG
    path.parent.mkdir(parents=True)
    path.write_text(log)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("TRACEML_ADDRESS", f"127.0.0.1:{listener.getsockname()[1]}")
        config = load(runs_dir=tmp_path, run_id="run-1", token="secret")
        with pytest.raises(AggregatorUnavailableError) as error:
            dial(config, Hello(role="client", run="run-1"), timeout_s=0.1, tries=1)

    cause = f"; {path} ends in: {log.strip()}" if log else ""
    assert error.value.reason == f"the aggregator of this run does not answer{cause}"
