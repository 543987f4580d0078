"""The aggregator of a launched job: started, kept alive, told how the ranks ended, and seen out.

Whoever launches a job holds the listening socket, so ranks can connect before the aggregator is up, and a new
aggregator takes over the same port when one dies. The aggregator ends with the process that keeps it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from traceml.errors import TraceMLError
from traceml.supervise.processes import spawn
from traceml.supervise.restarts import Restarts
from traceml.transport.client import Connection, connect
from traceml.transport.hello import Hello

__all__ = ["AggregatorProcess"]

# An aggregator that died is replaced at once; one that dies again and again, after pauses which double.
_ANSWER_TIMEOUT_S, _FINISH_TIMEOUT_S = 10.0, 20.0
_LOOK_S, _TELL_DELIVERY_S = 0.05, 1.5
_ENDING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
_STOP_TIMEOUT_S = 10.0  # its delivery processes save where they stand first

_log = logging.getLogger("traceml")


class AggregatorProcess:
    """Keeps one run's aggregator; a context manager, at whose exit it is gone.

    Args:
        run_id: name of the run's folder.
        runs_dir: where runs are kept, an absolute path.
        on_delivery: called once when the end has to wait for trackers that still take what was logged.
    """

    def __init__(self, run_id: str, runs_dir: Path, *, on_delivery: Callable[[], object] | None = None) -> None:
        self.run_id = run_id
        self.runs_dir = runs_dir
        self.token = os.environ.get("TRACEML_TOKEN") or secrets.token_hex(16)
        self._listener: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._restarts = Restarts()
        self._stopping = False
        self._on_delivery = on_delivery

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<keeper of the aggregator of run {self.run_id}>"

    @property
    def port(self) -> int:
        """The port on this host's loopback at which ranks find the aggregator; taken now, if it was not yet."""
        port: int = self._listen().getsockname()[1]
        return port

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return self.runs_dir / self.run_id

    def environ(self, address: str | None = None) -> dict[str, str]:
        """Return the variables by which a rank finds the aggregator and its run.

        Args:
            address: host:port at which the rank reaches it; by default this host's loopback.
        """
        return {
            "TRACEML_ADDRESS": address or f"127.0.0.1:{self.port}",
            "TRACEML_TOKEN": self.token,
            "TRACEML_RUN_ID": self.run_id,
            "TRACEML_RUNS_DIR": str(self.runs_dir),
            "TRACEML_SUPERVISED": "1",
        }

    def check(self) -> None:
        """See that the folder of the runs can be written, and make it; the run's own comes with the aggregator.

        Raises:
            TraceMLError: it cannot.
        """
        try:
            self.runs_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.runs_dir):
                pass
        except OSError as error:
            raise self._unwritable(self.runs_dir, error) from error

    def start(self) -> None:
        """Start an aggregator on our socket.

        Raises:
            TraceMLError: the run's folder cannot be written.
        """
        logs = self.run_dir / "logs"
        try:
            logs.mkdir(parents=True, exist_ok=True)
            log = (logs / "aggregator.log").open("ab")
        except OSError as error:
            raise self._unwritable(self.run_dir, error) from error

        fd = self._listen().fileno()
        command = [sys.executable, "-m", "traceml", "serve", "--fd", str(fd), "--run-id", self.run_id]
        command += ["--runs-dir", str(self.runs_dir), "--exit-when-idle"]
        self._restarts.started()
        with log:
            self._process = spawn(
                command,
                environ={**os.environ, "TRACEML_TOKEN": self.token},
                stdout=subprocess.DEVNULL,
                stderr=log,
                pass_fds=(fd,),
                own_session=True,
            )

    def keep(self) -> None:
        """Start the aggregator again if it died: the ranks still hold what it had not stored. Call it often."""
        if self._process is None or self._process.poll() is None or not self._restarts.due():
            return

        try:
            self.start()
        except (TraceMLError, OSError) as error:
            # the job goes on, and its ranks keep their rows; what became of them is told at the end
            _log.debug("no new aggregator yet: %s", error)

    def finish(self, exits: Sequence[dict[str, Any]], status: int) -> bool:
        """Tell how the processes ended, and that the run is over; return whether it is finished on disk.

        Args:
            exits: what is known of each rank's end, as the command `exits` takes it.
            status: what the job ended with, as a shell counts.
        """
        try:
            if self._process is None or self._process.poll() is not None:
                self.start()

            finished = self._tell_end(exits, status)
            if finished is None:  # it hangs, or died over it: a new one finds what the ranks have left in memory
                self._replace()
                finished = self._tell_end(exits, status)
        except (TraceMLError, OSError) as error:
            _log.debug("the run cannot be finished: %s", error)
            return False

        return bool(finished)

    def close(self) -> None:
        """See the aggregator out: it was told to stop, unless something went wrong. May be called again."""
        if self._listener is not None:
            self._listener.close()

        if self._process is None:
            return

        if not self._stopping:
            self._process.terminate()

        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _listen(self) -> socket.socket:
        if self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", 0), backlog=4096)

        return self._listener

    def _wait_for_deliveries(self, connection: Connection) -> None:
        """Wait while trackers still take what was logged; the aggregator gives those up that do not."""
        told_at_s: float | None = time.monotonic() + _TELL_DELIVERY_S
        while connection.request("deliveries", timeout_s=_ANSWER_TIMEOUT_S)["busy"] and not _is_interrupted():
            if told_at_s is not None and time.monotonic() > told_at_s and self._on_delivery is not None:
                self._on_delivery()
                told_at_s = None

            time.sleep(_LOOK_S)

    @staticmethod
    def _unwritable(folder: Path, error: OSError) -> TraceMLError:
        return TraceMLError(
            f"cannot write the run's folder {folder}: {error.strerror}. "
            "Choose another place with --runs-dir or TRACEML_RUNS_DIR."
        )

    def _replace(self) -> None:
        """Start a new aggregator in the place of one that does not answer."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

        self.start()

    def _tell_end(self, exits: Sequence[dict[str, Any]], status: int) -> bool | None:
        """Return whether the aggregator has finished the run; None without an answer."""
        hello = Hello(role="client", run=self.run_id)
        try:
            connection = connect("127.0.0.1", self.port, hello, self.token, timeout_s=_ANSWER_TIMEOUT_S)
        except (TraceMLError, OSError):
            return None

        with contextlib.closing(connection):
            try:
                connection.request("exits", {"exits": list(exits)}, timeout_s=_FINISH_TIMEOUT_S)
                connection.request("finish", {"status": status}, timeout_s=_FINISH_TIMEOUT_S)
            except OSError:  # a TimeoutError, or the connection broke
                return None
            except TraceMLError as error:
                _log.warning("%s", error)
                return False

            with contextlib.suppress(TraceMLError, OSError):
                self._wait_for_deliveries(connection)
                connection.request("stop", timeout_s=_ANSWER_TIMEOUT_S)
                self._stopping = True

        return True


def _is_interrupted() -> bool:
    """Take a signal that a supervisor holds back and that asks for the end: what is not delivered can be, later."""
    return bool(signal.sigpending() & _ENDING) and signal.sigtimedwait(_ENDING, 0) is not None
