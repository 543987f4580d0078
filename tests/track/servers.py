"""A real MLflow server of one's own, that can be killed and started again on the same port and database."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tests.forked import client as forked
from tests.ports import free_port

__all__ = ["MLflowServer"]


class MLflowServer:
    """`mlflow server` with a database file and its artifacts in `folder`.

    Args:
        folder: where everything lies; taken up again by a later start.
        arguments: more of the command line.
        database: one without a run to begin with; the server takes seconds to make its own.
    """

    def __init__(self, folder: Path, *arguments: str, database: Path | None = None) -> None:
        self.folder = folder
        if database is not None:
            shutil.copy(database, folder / "server.db")

        self.arguments = arguments
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, timeout_s: float = 240.0) -> MLflowServer:
        """Start it and wait until it answers."""
        assert self._process is None
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--workers", "1", *self.arguments]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        # Its queues of jobs for language models are eight more processes, each of which imports MLflow for seconds.
        quick = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        environment = {**os.environ, **quick}
        log = (self.folder / "server.log").open("ab")
        with log:
            self._process = forked.Popen(
                command, imports="mlflow", forks=True, cwd=self.folder, env=environment, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            assert self._process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=30) as answer:
                    assert answer.status == 200
                    return self
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)

        raise AssertionError(f"no answer within {timeout_s} s: {(self.folder / 'server.log').read_text()[-2000:]}")

    @property
    def is_running(self) -> bool:
        """Whether it was started and not killed."""
        return self._process is not None

    def kill(self) -> None:
        """Kill it and its workers, as a crash would."""
        if self._process is None:
            return

        try:
            os.killpg(self._process.pid, 9)
        except ProcessLookupError:
            pass  # it has ended by itself

        self._process.wait()
        self._process = None
