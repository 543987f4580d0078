"""Scripts that log, in processes of their own, and what has arrived in the store."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.aggregator.conftest import TOKEN, Serving
from tests.eventually import eventually
from tests.forked import client as forked
from tests.ports import free_port
from tests.recorder.conftest import environ
from tests.track.jobs import UNCOLLECTED
from traceml.database.store.reader import StoreReader
from traceml.run_folder import STORE_NAME
from traceml.track.delivery.record_reader import RecordReader
from traceml.track.plugins.metric import Metric

Script = Callable[..., "subprocess.Popen[str]"]


class Stored:
    """Logged rows of a run's store."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.metrics: list[tuple[int, Metric]] = []  # (number of the experiment, value)
        self.rows: list[dict[str, Any]] = []
        with StoreReader(run_dir / STORE_NAME) as reader:
            records, cursor = RecordReader(reader), {"frame": 0, "row": 0}
            while (batch := records.read(cursor)).cursor != cursor:
                cursor = batch.cursor
                for _, experiment, metrics in batch.metrics:
                    self.metrics += [(experiment, metric) for metric in metrics]

                self.rows += [logged.row for logged in batch.logged]

            self.streams = reader.streams()
            facts = reader.meta().get("run", {})
            self.ended = facts.get("ended") is not None
            self.state = facts.get("state")

    def values(self, name: str) -> list[float]:
        return [metric.value for _, metric in self.metrics if metric.name == name]

    def steps(self, name: str) -> list[int | None]:
        return [metric.step for _, metric in self.metrics if metric.name == name]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["kind"] == kind]


def runs_in(folder: Path) -> list[Path]:
    if not folder.exists():
        return []

    return sorted(path for path in folder.iterdir() if (path / STORE_NAME).exists() and not path.is_symlink())


def ended_run(folder: Path) -> Stored:
    """Wait for the one run in a folder to be over; return what it holds."""

    def over() -> bool:
        runs = runs_in(folder)
        if not runs:
            return False

        with StoreReader(runs[0] / STORE_NAME) as reader:
            return reader.meta().get("run", {}).get("ended") is not None

    eventually(over)
    (run,) = runs_in(folder)
    return Stored(run)


CREATE = """
import sys
from pathlib import Path
from traceml.track.backends.mlflow_database import prepare_database
prepare_database(Path(sys.argv[1]), is_ours=True)
"""


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's database without a run, to copy: to make one takes seconds. The workers of pytest-xdist share it."""
    own = tmp_path_factory.getbasetemp()
    path = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "empty-mlflow.db"
    if not path.exists():
        forked.run([sys.executable, "-c", CREATE, str(path)], imports="mlflow", check=True)

    return path


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Script]:
    """Start code as a script of its own; it logs to an aggregator that it starts by itself, or to a given one."""
    started: list[subprocess.Popen[str]] = []
    port = free_port()

    def start(code: str, *arguments: object, serving: Serving | None = None, **values: str) -> subprocess.Popen[str]:
        path = tmp_path / f"script{len(started)}.py"
        path.write_text(textwrap.dedent(code))
        own = {"TRACEML_PORT": str(port), **UNCOLLECTED}
        if serving is not None:
            own |= {"TRACEML_PORT": str(serving.port), "TRACEML_TOKEN": TOKEN}

        process = forked.Popen(
            [sys.executable, str(path), *map(str, arguments)],
            forks=serving is None,  # its aggregator
            imports="torch" if "torch" in code else "aggregator",
            env=environ(tmp_path, **(own | values)),
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    """Wait for a script's end; return what it printed."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == status, err
    return out


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    """A real aggregator."""
    server = Serving(tmp_path / "runs", tmp_path / "aggregator.log")
    yield server
    server.close()
