"""Jobs of frameworks, each in processes of its own and with an aggregator that it starts by itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.aggregator.conftest import serving
from tests.eventually import eventually
from tests.forked import client as forked
from tests.ports import free_port
from tests.recorder.conftest import environ
from traceml.runs.run import Run

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

__all__ = ["Ended", "Job", "job", "jobs_in", "serving"]


@dataclass
class Ended:
    """Results of a job.

    Attributes:
        said: what it printed as its last line of JSON.
        stderr: what it said besides.
        folder: where it ran.
    """

    said: Any
    stderr: str
    folder: Path

    @property
    def runs(self) -> list[Run]:
        """The job's runs, the oldest first, all ended and reported."""
        runs = self.folder / "traceml_runs"
        folders = [path for path in runs.iterdir() if path.name[0] != "." and not path.is_symlink()]
        for path in folders:
            eventually((path / "report.json").exists)

        return [Run(path) for path in sorted(folders, key=_started_s)]

    @property
    def run(self) -> Run:
        """Its only run."""
        (run,) = self.runs
        return run

    def metrics(self, run: Run) -> list[tuple[str, int, float]]:
        """Name, step and value of what a run has captured, in the order of the calls."""
        names = {(row["rank"], row["id"]): row["name"] for row in run.log("names")}
        rows = run.table("metrics")
        return [(names[row["rank"], row["name_id"]], int(row["step"]), float(row["value"])) for row in rows]


Job = Callable[..., Ended]


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """Run a script of this folder; its whole process group is ended afterwards."""
    with jobs_in(tmp_path) as run:
        yield run


@contextmanager
def jobs_in(folder: Path, timeout_s: float = 240) -> Iterator[Job]:
    """Run scripts of this folder in another one; their whole process groups are ended afterwards."""
    started: list[subprocess.Popen[str]] = []

    def run(script: str, *arguments: str, ranks: int = 1, **values: str) -> Ended:
        own = {"TRACEML_PORT": str(free_port()), "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"} | values
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        imports = "lightning" if script == "lightning_job.py" else "torch"
        process = forked.Popen(
            [sys.executable, *launcher, str(HERE / script), *arguments],
            env=environ(folder, TRACEML_QUIET="", **own), cwd=folder, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, imports=imports, forks=True,
        )  # fmt: skip
        started.append(process)
        stdout, stderr = process.communicate(timeout=timeout_s)
        assert process.returncode == 0, stdout + stderr
        lines = [line for line in stdout.splitlines() if line.startswith('{"')]
        return Ended(json.loads(lines[-1]) if lines else None, stderr, folder)

    try:
        yield run
    finally:
        for process in started:
            with process:  # closes its pipes, which would fail another test, and waits
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)


def _started_s(path: Path) -> float:
    started: float = json.loads((path / "report.json").read_text())["run"]["started"]
    return started
