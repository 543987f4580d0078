"""`traceml top` on a real terminal, watching a store that a test writes."""

from __future__ import annotations

import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.diagnosis.fabricated import Job, adds
from tests.runs.fabricated_store import store_run
from traceml import cli
from traceml.clock import boot_id, process_start_ticks
from traceml.database.store.store import StoreWriter
from traceml.run_folder import STORE_NAME


def running_run(folder, **facts):
    """A run whose aggregator is this process, so it counts as alive."""
    going = {"state": "running", "ended": None, "started": time.time() - 30, **facts}
    store_run(folder, Job(), adds("forward", 20.0, (1,)), facts=going, state="running")
    pid = os.getpid()
    with StoreWriter(folder / STORE_NAME) as writer:
        writer.put_meta(
            "aggregator",
            {"host": socket.gethostname(), "boot_id": boot_id(), "pid": pid, "start_ticks": process_start_ticks(pid)},
        )
        writer.commit()

    return folder


class OnTerminal:
    """`traceml top` on a pseudo-terminal."""

    def __init__(self, folder, *words: str) -> None:
        self.master, slave = pty.openpty()
        environ = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "traceml", "top", *words],
            cwd=folder, env=environ, stdin=slave, stdout=slave, stderr=slave,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
        )  # fmt: skip
        os.close(slave)
        self.seen = b""

    def until(self, text: str, timeout_s: float = 120.0) -> None:
        deadline = time.monotonic() + timeout_s
        while text.encode() not in self.seen:
            left_s = deadline - time.monotonic()
            assert left_s > 0, f"{text!r} did not come: {self.seen[-2000:]!r}"
            if select.select([self.master], [], [], left_s)[0]:
                self.seen += os.read(self.master, 65536)

    def press(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def end(self) -> int:
        try:
            return self.process.wait(240)
        finally:
            self.close()

    def close(self) -> None:
        if self.master >= 0:
            self.process.kill()
            self.process.wait()
            os.close(self.master)
            self.master = -1


@pytest.fixture
def top(tmp_path):
    """Start `traceml top` with words; whatever happens it does not outlive the test."""
    started: list[OnTerminal] = []

    def start(*words: str) -> OnTerminal:
        started.append(OnTerminal(tmp_path, *words))
        return started[-1]

    yield start
    for each in started:
        each.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_leaves_the_terminal_as_it_was(tmp_path, top, number):
    """As of `kill`, a closed window, or Ctrl-backslash."""
    running_run(tmp_path / "traceml_runs" / "going-on")
    shown = top()
    shown.until("q quits")

    shown.process.send_signal(number)

    shown.until("\x1b[?1049l")
    assert shown.end() == 128 + number
    assert b"Traceback" not in shown.seen


@pytest.mark.parametrize("leave", [b"q", b"\x1b", signal.SIGINT])
def test_top_shows_the_running_job_until_a_key(tmp_path, top, leave):
    """The newest running job is shown with its slow rank; q, Escape and Ctrl-C leave, with status 0."""
    running_run(tmp_path / "traceml_runs" / "going-on", name="my-train")
    shown = top()
    shown.until("\x1b[?1049h")
    shown.until("my-train")
    shown.until("Rank 1 is slow in forward")
    shown.until("q quits")

    if isinstance(leave, bytes):
        shown.press(leave)
    else:
        shown.process.send_signal(leave)
    shown.until("\x1b[?1049l")

    assert shown.end() == 0
    assert b"Traceback" not in shown.seen


def test_end_of_the_job_prints_its_verdict(tmp_path, top):
    """When the job ends the screen is left and the card is printed."""
    folder = running_run(tmp_path / "traceml_runs" / "going-on")
    shown = top("going-on")
    shown.until("q quits")
    with StoreWriter(folder / STORE_NAME) as writer:
        facts = {"id": "going-on", "name": "train", "world_size": 2, "state": "finished"}
        writer.put_meta("run", {**facts, "started": time.time() - 30, "ended": time.time()})
        writer.commit()

    shown.until("\x1b[?1049l")
    shown.until("traceml report going-on")

    assert shown.end() == 0
    assert b"COMPUTE_STRAGGLER" in shown.seen.split(b"\x1b[?1049l")[1]


def test_no_running_job_is_reported(tmp_path, top):
    """Without a running job the error names where it looked and the latest run's report."""
    store_run(tmp_path / "traceml_runs" / "over", Job(steps=60))
    shown = top()
    shown.until("no job is running in")
    shown.until("traceml report")

    assert shown.end() == 3


def test_run_that_is_over_is_reported(tmp_path, top):
    """A run by its id that has ended points to its report."""
    store_run(tmp_path / "traceml_runs" / "over", Job(steps=60))
    shown = top("over")
    shown.until("run over has ended")

    assert shown.end() == 3


def test_address_without_an_aggregator(top):
    """An address where no aggregator of this user is says so."""
    shown = top("127.0.0.1:1")
    shown.until("you have no aggregator at 127.0.0.1:1")

    assert shown.end() == 3


def test_pipe_is_refused_with_the_way_out(capsys):
    """In a pipe top says what works there."""
    assert cli.main(["top"]) == 2
    assert "traceml report" in capsys.readouterr().err
