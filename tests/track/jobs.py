"""Real jobs under `traceml run` that log without a pause, and a proxy by which a tracker misbehaves."""

from __future__ import annotations

import http.client
import http.server
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.eventually import eventually
from tests.forked import client as forked
from tests.recorder.conftest import environ
from traceml.track.tracker_state import TrackerState

__all__ = ["LOGGING", "UNCOLLECTED", "Job", "Proxy", "children_of", "finish"]

# No collectors: a process of its own imports, lists all packages and asks git, for longer than a script takes.
UNCOLLECTED = {"TRACEML_TRACK_GIT": "0", "TRACEML_TRACK_ENV": "0", "TRACEML_TRACK_SYSTEM": "0"}

# Logs until the file `enough` is there; `count` holds how many values it has logged, written after each.
LOGGING = """
    import json, os, sys, time, traceml

    backends = json.loads(sys.argv[1])
    count, i = os.open("count", os.O_RDWR | os.O_CREAT, 0o600), 0
    with traceml.Experiment("faults", backend=list(backends), options=backends, config={"lr": 0.1}) as experiment:
        while not os.path.exists("enough"):
            for _ in range(20):
                experiment.log_metric("loss", i / 8, step=i)
                i += 1
                os.pwrite(count, b"%012d" % i, 0)

            time.sleep(0.1)
"""


class Job:
    """A script under `traceml run`.

    Args:
        folder: where it runs.
        backends: name -> options.
        command: how the script is started instead.
        settings: further variables of the environment.
    """

    def __init__(
        self,
        folder: Path,
        backends: Mapping[str, Mapping[str, Any]],
        *,
        code: str = LOGGING,
        command: tuple[str, ...] = ("-m", "traceml", "run", "--live", "none"),
        **settings: str,
    ) -> None:
        self.folder = folder
        (folder / "script.py").write_text(textwrap.dedent(code))
        own = {"TRACEML_MAX_RETRIES": "2", "TRACEML_MAX_BACKOFF": "0.5", "TRACEML_COLLECTORS": "", **UNCOLLECTED}
        own |= {"TRACEML_DELIVERY_NICE": "0"}  # other tests may use every core
        own |= {"TRACEML_QUIET": ""}  # its card tells what was delivered
        self.environ = environ(folder, **(own | settings))
        trackers = {*backends} & forked.TRACKERS
        self.process = forked.Popen(
            [sys.executable, *command, "script.py", json.dumps(backends)],
            forks=bool(command),
            imports=trackers.pop() if len(trackers) == 1 and "torch" not in code else "torch",  # as its deliveries do
            cwd=folder,
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    @property
    def run_dir(self) -> Path:
        return (self.folder / "traceml_runs" / "latest").resolve()

    @property
    def logged(self) -> int:
        try:
            return int((self.folder / "count").read_text() or 0)
        except FileNotFoundError:
            return 0

    def state(self, backend: str) -> TrackerState:
        return TrackerState.load(self.run_dir, backend)

    def wait_for(self, condition: Callable[[], Any], timeout_s: float = 120) -> Any:
        def alive_or() -> Any:
            has_ended = self.process.poll() is not None  # before: its last act may make it true
            value = condition()
            assert value or not has_ended, self.process.communicate()
            return value

        return eventually(alive_or, timeout_s=timeout_s)

    def goes_on(self, values: int = 60) -> None:
        """Wait until the training has logged so many more values."""
        wanted = self.logged + values
        self.wait_for(lambda: self.logged >= wanted)

    def pid_of(self, words: str) -> int | None:
        """Return the newest process below this job whose command line holds some words."""
        found = [pid for pid in children_of(self.process.pid) if words in _command(pid)]
        return found[-1] if found else None

    def finish(self, timeout_s: float = 240) -> str:
        """Let the script end; return what `traceml run` printed beside the script's output."""
        (self.folder / "enough").touch()
        _, printed = self.process.communicate(timeout=timeout_s)
        assert self.process.returncode == 0, printed
        return printed

    def close(self) -> None:
        """Leave nothing behind."""
        with self.process:  # closes its pipes, which would fail another test, and waits
            for pid in [*children_of(self.process.pid), self.process.pid]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue


def children_of(pid: int) -> list[int]:
    """Return the processes below one, the nearest first."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += [int(word) for word in task.read_text().split()]
            except OSError:
                continue

    return found[1:]


def finish(folder: Path, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a command of ours to its end."""
    return forked.run(
        [sys.executable, "-m", "traceml", *words],
        forks=True,
        imports="mlflow",
        cwd=folder,
        env=environ(folder, **settings),
        capture_output=True,
        text=True,
        timeout=240,
    )


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


class Proxy:
    """A real HTTP server before a tracker's: passes on, or does what `behavior` says.

    Attributes:
        behavior: `pass`, `busy` (429, with Retry-After), `hang`.
        key: the bearer token that it wants, if any; others get a 401.
    """

    def __init__(self, port: int) -> None:
        self.behavior = "pass"
        self.key: str | None = None
        self.seen: dict[str, int] = {}
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, headers, data = proxy.answer(self.command, self.path, dict(self.headers), body, port)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)

                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer

            def log_message(self, *_: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """Say nothing of a client that went away: those that hang are ended."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(
        self, method: str, path: str, headers: dict[str, str], body: bytes, port: int
    ) -> tuple[int, dict[str, str], bytes]:
        """Return (status, headers, data) for one request."""
        if self.key is not None and headers.get("Authorization") != f"Bearer {self.key}":
            self._note("unauthorized")
            return 401, {}, b'{"error_code": "UNAUTHENTICATED", "message": "who are you?"}'

        behavior = self.behavior
        self._note(behavior)
        if behavior == "busy":
            return 429, {"Retry-After": "1"}, b'{"error_code": "REQUEST_LIMIT_EXCEEDED", "message": "later"}'

        while self.behavior == "hang":
            time.sleep(0.05)

        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            kept = {name: value for name, value in headers.items() if name.lower() not in {"host", "connection"}}
            connection.request(method, path, body, kept)
            answer = connection.getresponse()
            kind = {"Content-Type": answer.headers.get("Content-Type") or "application/json"}
            return answer.status, kind, answer.read()
        finally:
            connection.close()

    def close(self) -> None:
        """Stop listening."""
        self.behavior = "pass"
        self._server.shutdown()
        self._server.server_close()

    def _note(self, what: str) -> None:
        self.seen[what] = self.seen.get(what, 0) + 1
