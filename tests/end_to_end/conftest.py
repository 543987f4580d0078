"""Running the real command on real scripts, each in a folder of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.eventually import eventually
from tests.forked import client as forked
from traceml.database.store.reader import StoreReader
from traceml.run_folder import STORE_NAME

TINY = Path(__file__).with_name("tiny.py")


@dataclass
class Ended:
    """What is left of a run that ended."""

    status: int
    stdout: str
    stderr: str
    folder: Path

    @property
    def run_dir(self) -> Path:
        return (self.folder / "traceml_runs" / "latest").resolve()

    @property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads((self.run_dir / "report.json").read_text())
        return report


@dataclass
class Running:
    """A run that is going on."""

    process: subprocess.Popen[str]
    folder: Path

    def wait_for(self, condition: Callable[[], Any], what: str, timeout_s: float = 120) -> Any:
        """Poll until `condition` returns something true; return it."""
        return eventually(condition, what, timeout_s=timeout_s)

    def end(self, timeout_s: float = 240) -> Ended:
        stdout, stderr = self.process.communicate(timeout=timeout_s)
        return Ended(self.process.returncode, stdout, stderr, self.folder)

    def wait_for_ranks(self, count: int) -> None:
        """Wait until so many ranks have connected to the aggregator, which may start later than they."""
        path = self.folder / "traceml_runs" / "latest" / STORE_NAME

        def connected() -> bool:
            if not path.exists():
                return False

            with StoreReader(path) as reader:
                return len(reader.streams()) >= count

        self.wait_for(connected, f"{count} ranks to connect")

    def pid_of(self, rank: int) -> int:
        """The pid of a rank which trains; needs `--marker marker`."""
        path = self.folder / f"marker.{rank}"
        self.wait_for(lambda: path.exists() and path.read_text(), f"rank {rank} to train")
        return int(path.read_text())


class Traceml:
    """The command, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ = {key: value for key, value in os.environ.items() if not key.startswith("TRACEML_")}
        self.environ["OMP_NUM_THREADS"] = "1"
        self._running: list[subprocess.Popen[str]] = []

    def start(self, *words: str | Path, **environ: str) -> Running:
        process = forked.Popen(
            [sys.executable, "-m", "traceml", *map(str, words)],
            cwd=self.folder,
            env={**self.environ, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            forks=True,
        )
        self._running.append(process)
        return Running(process, self.folder)

    def __call__(self, *words: str | Path, **environ: str) -> Ended:
        return self.start(*words, **environ).end()

    def close(self) -> None:
        for process in self._running:
            with process:  # closes its pipes, which would fail another test, and waits
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def traceml(tmp_path: Path) -> Iterator[Traceml]:
    """The command, run in an empty folder."""
    command = Traceml(tmp_path)
    yield command
    command.close()
