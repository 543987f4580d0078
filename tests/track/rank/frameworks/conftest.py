"""Scripts that use a framework and log through it, and what of that is in the store."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.aggregator.conftest import TOKEN, Serving
from tests.eventually import eventually
from tests.forked import client as forked
from tests.recorder.conftest import environ
from tests.track.jobs import UNCOLLECTED
from traceml.aggregator.streams.stream import StreamState
from traceml.database.store.reader import StoreReader
from traceml.run_folder import STORE_NAME
from traceml.track.delivery.record_reader import RecordReader
from traceml.track.plugins.metric import Metric

RunScript = Callable[..., "Captured"]


@dataclass
class Captured:
    """Rows that a script logged.

    Attributes:
        metrics: values in the order of the store.
        logged: what is no number, by kind.
        said: what the script printed as its last line, from JSON.
        folder: where it ran.
        run_dir: its run's folder.
    """

    said: Any
    folder: Path
    run_dir: Path
    metrics: list[Metric] = field(default_factory=list)
    logged: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def values(self, kind: int | None = None) -> list[tuple[str, int | None, Any]]:
        """Name, step and value of what was logged by somebody."""
        return [(row.name, row.step, row.value) for row in self.metrics if kind is None or row.kind == kind]

    def has_ended(self) -> bool:
        """Whether its run is over: an aggregator that was slow stores what the script has left in memory before.

        Of a run that waits a minute for ranks that never come, those that have come.
        """
        with StoreReader(self.run_dir / STORE_NAME) as reader:
            run, streams = reader.meta()["run"], reader.streams()

        have_ended = bool(streams) and all(stream.state != StreamState.RUNNING for stream in streams)
        return run["ended"] is not None or (have_ended and len(streams) < run["world_size"])

    def read(self) -> None:
        with StoreReader(self.run_dir / STORE_NAME) as reader:
            batch = RecordReader(reader).read({}, 1_000_000)

        for part in batch.metrics:
            self.metrics += part.rows
        for one in batch.logged:
            self.logged.setdefault(one.row["kind"], []).append(one.row)


@pytest.fixture(scope="session")
def aggregator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """One real aggregator for all scripts."""
    folder = tmp_path_factory.mktemp("frameworks")
    server = Serving(folder / "runs", folder / "log")
    yield server
    server.close()


@pytest.fixture
def captured(aggregator: Serving, tmp_path: Path, request: pytest.FixtureRequest) -> RunScript:
    """Run code as a script of a run of its own; return what is in its store.

    It is forked from a process that has imported Lightning already, if it uses that, or what `imports` names.
    """

    def run(code: str, *arguments: str, imports: str = "", **values: str) -> Captured:
        script = tmp_path / "script.py"
        script.write_text(textwrap.dedent(code))
        job = "".join(each if each.isalnum() else "-" for each in request.node.name).strip("-")
        own = {
            "TRACEML_PORT": str(aggregator.port),
            "TRACEML_TOKEN": TOKEN,
            "TRACEML_RUN_ID": job,
            **UNCOLLECTED,
        } | values
        done = forked.run(
            [sys.executable, "-W", "ignore", str(script), *arguments],
            imports=imports or ("lightning" if "lightning" in code else "torch"),
            env=environ(tmp_path, **own), cwd=tmp_path, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stdout.splitlines() if line.startswith(("{", "["))]
        result = Captured(json.loads(lines[-1]) if lines else None, tmp_path, aggregator.folder / job)
        eventually(result.has_ended, "the end of the run")
        result.read()
        return result

    return run
