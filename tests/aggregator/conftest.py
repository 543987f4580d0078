"""Real aggregators in processes of their own, and ranks that talk to them through the real connection."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.eventually import eventually
from tests.forked import client as forked
from traceml.database.schema import STEPS
from traceml.database.store.reader import StoreReader
from traceml.run_folder import STORE_NAME
from traceml.transport.client import Connection, connect
from traceml.transport.hello import Hello

TOKEN = "test-token"
ROOT = Path(__file__).parents[2]
_STEP_ROW = STEPS.partial_struct(
    "step", "t_end_ns", "total_ns", "input_wait_ns", "forward_ns", "backward_ns", "optimizer_ns", "backward_own_ns",
    "bits",
)  # fmt: skip


def step_row(step: int, total_ns: int = 1_000_000) -> bytes:
    """A step whose parts add up."""
    part = total_ns // 10
    return _STEP_ROW.pack(step, (step + 1) * total_ns, total_ns, part, 3 * part, 4 * part, part, 4 * part, 1)


def step_rows(start: int, count: int) -> bytes:
    return b"".join(step_row(step) for step in range(start, start + count))


class Serving:
    """An aggregator in a process of its own, on a socket that outlives it."""

    def __init__(self, folder: Path, log: Path, *options: str, tls: bool = False) -> None:
        self.folder = folder
        self.options = options
        self.tls = tls
        self.sock = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: int = self.sock.getsockname()[1]
        self.log = log
        self.process: subprocess.Popen[bytes]
        self.start()

    def start(self) -> None:
        ready, tell = os.pipe()
        fd = self.sock.fileno()
        command = [sys.executable, "-m", "traceml", "serve", "--fd", str(fd), "--ready-fd", str(tell)]
        with self.log.open("ab") as log:
            self.process = forked.Popen(
                [*command, "--runs-dir", str(self.folder), *self.options],
                env={**os.environ, "TRACEML_TOKEN": TOKEN, "TRACEML_TLS": str(self.tls).lower()},
                pass_fds=(fd, tell),
                stdout=log,
                stderr=log,
                imports="aggregator",
                forks=True,  # the processes that write reports
            )

        os.close(tell)
        try:
            assert os.read(ready, 16), self.log.read_text()
        finally:
            os.close(ready)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

        return self.process.wait(240)

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()

        self.sock.close()

    def rank(
        self, rank: int = 0, world_size: int = 1, *, run: str = "job", recorder: str = "", **facts: Any
    ) -> Connection:
        hello = Hello(
            role="rank", run=run, rank=rank, world_size=world_size, name="test",
            recorder=recorder or f"recorder-{rank}", **facts,
        )  # fmt: skip
        return connect("127.0.0.1", self.port, hello, TOKEN, timeout_s=60, tls=self.tls)

    def ask(self, command: str, args: dict[str, Any] | None = None, *, run: str = "") -> dict[str, Any]:
        connection = connect("127.0.0.1", self.port, Hello(role="client", run=run), TOKEN, timeout_s=60, tls=self.tls)
        try:
            return connection.request(command, args, timeout_s=60)
        finally:
            connection.close("done")

    @property
    def run_dirs(self) -> list[Path]:
        return sorted(
            path for path in self.folder.iterdir() if path.is_dir() and not path.is_symlink() and path.name[0] != "."
        )

    def store(self) -> StoreReader:
        """The newest run's store."""
        return StoreReader((self.folder / "latest").resolve() / STORE_NAME)

    def run_facts(self) -> dict[str, Any]:
        with self.store() as reader:
            facts: dict[str, Any] = reader.meta()["run"]
            return facts

    def state(self) -> str:
        return str(self.run_facts()["state"])


def wait_for_acks(connection: Connection, table: str, seq: int) -> None:
    def acked() -> bool:
        connection.receive(0.05)
        return connection.acked.get(table, 0) >= seq

    eventually(acked)


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the host's memory, where tests beside this one have flight files of the same job."""
    folder = tmp_path / "memory"
    folder.mkdir(mode=0o700)
    monkeypatch.setattr("traceml.aggregator.recovery.default_folder", lambda: folder)
    return folder


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Callable[..., Serving]]:
    """Start aggregators; what still runs at the end is killed."""
    started: list[Serving] = []

    def start(*options: str, folder: Path | None = None, tls: bool = False) -> Serving:
        started.append(Serving(folder or tmp_path / "runs", tmp_path / "log", *options, tls=tls))
        return started[-1]

    yield start
    for each in started:
        each.close()
