"""Handle of the aggregator process in its parent, the launching process.

The launching process holds the listening socket: ranks can connect before the aggregator is up, and a new aggregator
takes over the port if one dies. The aggregator ends with the launching process.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from traceml.errors import TraceMLError
from traceml.fail_open import print_notice
from traceml.helper_programs import helper_program
from traceml.ids import new_run_id, safe_run_id
from traceml.process_ends import exit_text
from traceml.run_folder import AGGREGATOR_LOG, STORE_NAME, STORE_PATH_BYTES, aggregator_words, unwritable_text
from traceml.setting_sources import TLS_PREFIX
from traceml.supervise.aggregator_client import AggregatorClient
from traceml.supervise.processes import REPORT_LIMIT_S, spawn
from traceml.supervise.restarting_process import RestartingProcess
from traceml.transport.folder_aggregator import create_runs_dir

if TYPE_CHECKING:
    from traceml.settings import Config
    from traceml.transport.client import Connection
    from traceml.transport.exit_report import ExitReport

__all__ = ["AggregatorProcess", "choose_run_id"]

_ANSWER_TIMEOUT_S, _START_TIMEOUT_S, _FINISH_TIMEOUT_S = 10.0, 60.0, 20.0
_COMPLETE_TIMEOUT_S = REPORT_LIMIT_S + 60.0
_ENDS_S = 1.0
_FIRST_POLL_S, _LAST_POLL_S, _REPORT_DELIVERY_S = 0.002, 0.05, 1.5
_ENDING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
_STOP_TIMEOUT_S = 10.0  # its delivery processes save their position first

_log = logging.getLogger("traceml")


class AggregatorProcess(RestartingProcess):
    """The aggregator of one run. A context manager: its exit ends the aggregator.

    Args:
        runs_dir: folder of all runs, an absolute path.
        on_completing: called before the aggregator is asked to complete the run, which takes it a moment.
        on_delivery: called once if the end has to wait for trackers that still receive logged values.
        settings: variables of its environment, in addition to ours.
        token: by default that of the environment, or a new one.
        is_shared: whether ranks of other nodes may connect; else it listens on this host only.
        tls: whether it encrypts connections; only if it is shared.
    """

    def __init__(
        self,
        run_id: str,
        runs_dir: Path,
        *,
        on_completing: Callable[[], object] = lambda: None,
        on_delivery: Callable[[], object] | None = None,
        settings: Mapping[str, str] | None = None,
        token: str | None = None,
        is_shared: bool = False,
        tls: bool = False,
    ) -> None:
        super().__init__()
        self.run_id = run_id
        self.runs_dir = runs_dir
        # `secrets` takes 5 ms to import
        self.token = token or os.environ.get("TRACEML_TOKEN") or os.urandom(16).hex()
        self._is_shared, self._tls = is_shared, tls and is_shared
        self._listener: socket.socket | None = None
        self._rank_pipe: tuple[int, int] | None = None
        self._stopping = self._has_told = False
        self._on_completing, self._on_delivery = on_completing, on_delivery
        self._settings = dict(settings or {})

    def __repr__(self) -> str:
        return f"<aggregator process of run {self.run_id}>"

    @property
    def port(self) -> int:
        """The port on this host's loopback at which ranks find the aggregator; bound on first use."""
        port: int = self._listen().getsockname()[1]
        return port

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return self.runs_dir / self.run_id

    def watch_ranks(self) -> int:
        """Return a descriptor that can be read when there is a message of `rank_messages`; `close` closes it.

        Call it before the start.
        """
        if self._rank_pipe is None:
            self._rank_pipe = os.pipe()
            for descriptor in self._rank_pipe:
                os.set_blocking(descriptor, False)

        return self._rank_pipe[0]

    def rank_messages(self) -> list[dict[str, Any]]:
        """Return what is new about the ranks, if anything.

        One without facts says that all have said bye: their processes take a moment to end. Others are those of
        `stuck_line`, as no rank can print that the job is stuck.
        """
        if self._rank_pipe is None:
            return []

        import json

        try:
            data = os.read(self._rank_pipe[0], 65536)
        except BlockingIOError:
            return []

        return [json.loads(line or b"{}") for line in data.splitlines()]

    def environ(self, address: str | None = None) -> dict[str, str]:
        """Return the variables by which a rank finds the aggregator and its run.

        Args:
            address: host:port at which the rank reaches it; by default this host's loopback.
        """
        return {
            "TRACEML_ADDRESS": address or f"{TLS_PREFIX if self._tls else ''}127.0.0.1:{self.port}",
            "TRACEML_TOKEN": self.token,
            "TRACEML_RUN_ID": self.run_id,
            "TRACEML_RUNS_DIR": str(self.runs_dir),
        }

    def check(self) -> None:
        """Check that the folder of the runs can be written, and create it.

        Raises:
            TraceMLError: it cannot be written.
        """
        import tempfile  # with `random` and OpenSSL's hashes: 5 ms, for which `traceml run`'s script would wait

        try:
            self._create_runs_dir()
            with tempfile.TemporaryFile(dir=self.runs_dir):
                pass
        except OSError as error:
            raise _unwritable(self.runs_dir, error) from error

    def start(self) -> None:
        """Start it. In place of one that has ended with an error, say so once: nothing is stored meanwhile.

        Raises:
            TraceMLError: the run's folder cannot be written.
        """
        status = self.process.poll() if self.process is not None else None
        if status is not None and status > 0 and not self._has_told:
            from traceml.formatting import printable

            self._has_told = True
            why = aggregator_words(self.run_dir).rstrip(".") or exit_text(status)
            print_notice(
                f"the aggregator has ended ({printable(why)}). The training continues. The aggregator is being "
                f"restarted; until it runs, nothing is stored."
            )

        super().start()

    def spawn_process(self) -> subprocess.Popen[bytes]:
        """Start an aggregator on our socket.

        Raises:
            TraceMLError: the run's folder cannot be written.
        """
        log_path = self.run_dir / AGGREGATOR_LOG
        try:
            self._create_runs_dir()
            log_path.parent.mkdir(parents=True, exist_ok=True)
            log = log_path.open("ab")
        except OSError as error:
            raise _unwritable(self.run_dir, error) from error

        fd = self._listen().fileno()
        command = helper_program("traceml", "serve", "--fd", str(fd), "--run-id", self.run_id)
        command += ["--runs-dir", str(self.runs_dir), "--exit-when-idle", "--launcher-pid", str(os.getpid())]
        passed = [fd]
        if self._rank_pipe is not None:
            command += ["--ranks-fd", str(self._rank_pipe[1])]
            passed.append(self._rank_pipe[1])

        with log:
            return spawn(
                command,
                environ={**os.environ, **self._settings, "TRACEML_TOKEN": self.token},
                stdout=subprocess.DEVNULL,
                stderr=log,
                pass_fds=passed,
                own_session=True,
            )

    def _create_runs_dir(self) -> None:
        if len(os.fsencode(self.run_dir / STORE_NAME)) > STORE_PATH_BYTES:
            reason = f"SQLite takes no path of more than {STORE_PATH_BYTES} bytes, and the store's is longer"
            raise OSError(errno.ENAMETOOLONG, reason)

        create_runs_dir(self.runs_dir)

    def report_ends(self, exits: Iterable[ExitReport]) -> bool:
        """Tell it of ranks that have ended while the job runs; return whether it knows now. `finish` tells it again."""
        return self.client.ask("exits", {"exits": [each.to_message() for each in exits]}, _ENDS_S)

    def finish(self, exits: Sequence[ExitReport], status: int, ended_by: Mapping[str, Any] | None = None) -> bool:
        """Report the end of the processes and of the run; return whether it is complete on disk.

        Args:
            exits: the end of each rank.
            status: the job's exit status, as in a shell.
            ended_by: the signal that asked for the end, in the form of the command `finish`.
        """
        end = {"status": status} if ended_by is None else {"status": status, "ended_by": dict(ended_by)}
        try:
            if not self.running:
                self.start()

            finished = self._report_end(exits, end)
            if finished is None:  # it hangs or died: a new one reads what the ranks have left in memory
                self._replace()
                finished = self._report_end(exits, end)
        except (TraceMLError, OSError) as error:
            _log.debug("the run cannot be finished: %s", error)
            return False

        return bool(finished)

    def close(self) -> None:
        """End the aggregator, unless `finish` has stopped it. May be called again."""
        if self._listener is not None:
            self._listener.close()

        if self.process is not None and not self._stopping:
            self.process.terminate()

        self.wait_or_kill(_STOP_TIMEOUT_S)
        descriptors, self._rank_pipe = self._rank_pipe or (), None
        for each in descriptors:
            os.close(each)

    def _listen(self) -> socket.socket:
        if self._listener is None:
            self._listener = _shared_listener() if self._is_shared else _listener("127.0.0.1")

        return self._listener

    def prepare_requests(self) -> None:
        """Import what requests need. Call it when the script no longer waits for this; further calls have no effect."""
        import hashlib  # noqa: F401 - by `transport.auth`, when it proves the token
        import hmac  # noqa: F401 - likewise

        from traceml.inspection import kernel_state  # noqa: F401
        from traceml.transport import client  # noqa: F401

    @property
    def client(self) -> AggregatorClient:
        """The client for commands about this run."""
        return AggregatorClient("127.0.0.1", self.port, self.token, self.run_id, self._tls)

    def _connect(self, timeout_s: float) -> Connection:
        return self.client.connect(timeout_s)

    def _connect_at_end(self) -> Connection:
        """Connect; try again while the aggregator computes, as one that starts on a busy host does.

        Raises:
            TraceMLError, OSError: it does not answer.
        """
        until_s, used_s = time.monotonic() + _START_TIMEOUT_S, self._cpu_s()
        while True:
            try:
                return self._connect(_ANSWER_TIMEOUT_S)
            except (TraceMLError, OSError):
                before_s, used_s = used_s, self._cpu_s()
                if used_s <= before_s or time.monotonic() > until_s:
                    raise

    def _cpu_s(self) -> float:
        from traceml.inspection.kernel_state import process_info

        info = process_info(self.process.pid) if self.process is not None and self.running else None
        return 0.0 if info is None else info.cpu_s

    def _wait_for_deliveries(self, connection: Connection) -> None:
        """Wait until trackers have received what was logged; the aggregator skips those that make no progress."""
        report_at_s: float | None = time.monotonic() + _REPORT_DELIVERY_S
        pause_s = _FIRST_POLL_S  # without trackers there is little left to do
        while connection.request("deliveries", timeout_s=_ANSWER_TIMEOUT_S)["busy"] and not _is_interrupted():
            if report_at_s is not None and time.monotonic() > report_at_s and self._on_delivery is not None:
                self._on_delivery()
                report_at_s = None

            time.sleep(pause_s)
            pause_s = min(1.25 * pause_s, _LAST_POLL_S)

    def _complete(self, connection: Connection, end: dict[str, Any]) -> None:
        """Ask it to complete the run, and wait: the report of a long run may take longer than any other answer.

        Raises:
            TraceMLError: the run cannot be completed.
            TimeoutError: it hangs.
            ConnectionError: it has died.
        """
        number = connection.send_command("finish", end)
        until_s = time.monotonic() + _COMPLETE_TIMEOUT_S
        while True:
            used_s = self._cpu_s()
            try:
                connection.await_reply(number, "finish", timeout_s=_FINISH_TIMEOUT_S)
            except TimeoutError:
                if _is_interrupted() or time.monotonic() > until_s or not self._works(connection, used_s):
                    raise
            else:
                return

    def _works(self, connection: Connection, used_s: float) -> bool:
        """Whether it computes, or answers while it waits for the process of the report."""
        try:
            return self._cpu_s() > used_s or bool(connection.request("status", timeout_s=_ANSWER_TIMEOUT_S))
        except TimeoutError:
            return False

    def _replace(self) -> None:
        """Start a new aggregator in place of one that does not answer."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

        self.start()

    def _report_end(self, exits: Iterable[ExitReport], end: dict[str, Any]) -> bool | None:
        """Return whether the aggregator has completed the run; None without an answer."""
        try:
            connection = self._connect_at_end()
        except (TraceMLError, OSError):
            return None

        with contextlib.closing(connection):
            try:
                known = [each.to_message() for each in exits]
                connection.request("exits", {"exits": known}, timeout_s=_FINISH_TIMEOUT_S)
                self._on_completing()
                self._complete(connection, end)
            except OSError:  # a TimeoutError, or the connection broke
                return None
            except TraceMLError as error:
                _log.warning("the run is not complete: %s", error)
                return False

            with contextlib.suppress(TraceMLError, OSError):
                self._wait_for_deliveries(connection)
                connection.request("stop", timeout_s=_ANSWER_TIMEOUT_S)
                self._stopping = True

        return True


def _listener(host: str, **options: Any) -> socket.socket:
    return socket.create_server((host, 0), backlog=4096, **options)


def _shared_listener() -> socket.socket:
    """Listen on all interfaces, as torch's store does: which one leads to another node is not known before."""
    with contextlib.suppress(OSError, ValueError):  # no IPv6
        return _listener("::", family=socket.AF_INET6, dualstack_ipv6=True)

    return _listener("0.0.0.0")  # noqa: S104 - see above


def _is_interrupted() -> bool:
    """Return whether a blocked signal asks for the end; undelivered values can be delivered later."""
    return bool(signal.sigpending() & _ENDING) and signal.sigtimedwait(_ENDING, 0) is not None


def _unwritable(folder: Path, error: OSError) -> TraceMLError:
    return TraceMLError(
        unwritable_text(folder, "the run's folder", error)
        + ". Choose another place with --runs-dir or TRACEML_RUNS_DIR."
    )


def choose_run_id(config: Config, name: str) -> str:
    """Return the run id that the user asked for, or a new one that contains `name`.

    A job that a traced script starts is a run of its own: the id that it inherits is that of the script's run.
    """
    wanted = safe_run_id(config.run_id) if config.run_id else None
    inherited = wanted is not None and config.supervised and (config.runs_dir / wanted).exists()
    return new_run_id(name, config.runs_dir) if wanted is None or inherited else wanted
