"""One job on this host: its aggregator, its processes, its output, its signals, its end.

The supervisor holds the listening socket, so ranks can connect before the aggregator is up, and a new aggregator takes
over the same port when one dies. It passes the job's output and signals through, tells the aggregator how processes
ended, and dies without leaving anything behind: the kernel ends the job with it, and the aggregator ends with the job.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

from traceml.errors import TraceMLError
from traceml.launch.elastic import status_of
from traceml.launch.processes import PASSED_ON, PseudoTerminal, spawn
from traceml.transport.client import connect
from traceml.transport.hello import Hello

__all__ = ["Job", "Outcome", "Screen", "Supervisor"]

_TICK_S = 0.1
# An aggregator that died is replaced at once; one that dies again and again, after pauses which double.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _LIVED_LONG_S = 0.5, 30.0, 60.0
_ANSWER_TIMEOUT_S, _FINISH_TIMEOUT_S = 10.0, 20.0
_SI_KERNEL = 0x80  # siginfo's code for a signal that the terminal sent, to the whole foreground group

_log = logging.getLogger("traceml")


@dataclass(frozen=True, slots=True)
class Job:
    """What to run.

    Args:
        command: program and arguments, ready to execute.
        elastic: whether the program is our torchrun, which tells its failures itself.
        run_id: name of the run's folder.
        runs_dir: where runs are kept.
        environ: variables for the job, over this process's own.
    """

    command: Sequence[str]
    elastic: bool
    run_id: str
    runs_dir: Path
    environ: Mapping[str, str] = field(default_factory=dict)

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return self.runs_dir / self.run_id


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended: `status` as a shell counts, and whether the aggregator finished the run itself."""

    status: int
    finished: bool


class Screen(Protocol):
    """Something that shows a running job."""

    def tick(self) -> None:
        """Draw anew if it is time."""

    def write(self, data: bytes) -> None:
        """Show output of the script."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class Supervisor:
    """Runs one job to its end; a context manager, at whose exit nothing of the job is left."""

    def __init__(self, job: Job, *, make_screen: Callable[[], Screen] | None = None) -> None:
        """Prepare a job.

        Args:
            job: what to run.
            make_screen: makes the live view once the job is started; without one the job writes to our own terminal
                or pipe, and nothing stands between.
        """
        self._job = job
        self._make_screen = make_screen
        self._screen: Screen | None = None
        self._token = os.environ.get("TRACEML_TOKEN") or secrets.token_hex(16)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self._aggregator: subprocess.Popen[bytes] | None = None
        self._aggregator_started_s = self._aggregator_due_s = 0.0
        self._pause_s = _FIRST_PAUSE_S
        self._stopping = False
        self._failures: list[dict[str, Any]] = []
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> Self:
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
        return self

    def __exit__(self, *_: object) -> None:
        self._end_aggregator()
        self._selector.close()
        self._listener.close()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)

    def run(self) -> Outcome:
        """Run the job; return when every process of it has ended and the run is finished on disk."""
        self._start_aggregator()
        process = self._run_job()
        finished = self._finish(process)
        return Outcome(self._status(process), finished)

    @property
    def _port(self) -> int:
        port: int = self._listener.getsockname()[1]
        return port

    # the aggregator

    def _start_aggregator(self) -> None:
        """Start an aggregator on our socket.

        Raises:
            TraceMLError: the run's folder cannot be written.
        """
        logs = self._job.run_dir / "logs"
        try:
            logs.mkdir(parents=True, exist_ok=True)
            log = (logs / "aggregator.log").open("ab")
        except OSError as error:
            raise TraceMLError(
                f"cannot write the run's folder {self._job.run_dir}: {error.strerror}. "
                "Choose another place with --runs-dir or TRACEML_RUNS_DIR."
            ) from error

        fd = self._listener.fileno()
        command = [sys.executable, "-m", "traceml", "serve", "--fd", str(fd), "--run-id", self._job.run_id]
        command += ["--runs-dir", str(self._job.runs_dir), "--exit-when-idle"]
        self._aggregator_started_s = time.monotonic()
        with log:
            self._aggregator = spawn(
                command,
                environ={**os.environ, "TRACEML_TOKEN": self._token},
                stdout=subprocess.DEVNULL,
                stderr=log,
                pass_fds=(fd,),
                own_session=True,
            )

    def _keep_aggregator(self) -> None:
        """Start the aggregator again if it died: the ranks still hold what it had not stored."""
        if self._aggregator is None or self._aggregator.poll() is None:
            return

        now_s = time.monotonic()
        if now_s < self._aggregator_due_s:
            return

        if now_s - self._aggregator_started_s > _LIVED_LONG_S:
            self._pause_s = _FIRST_PAUSE_S

        self._aggregator_due_s = now_s + self._pause_s
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        try:
            self._start_aggregator()
        except (TraceMLError, OSError) as error:
            # the job goes on, and its ranks keep their rows; what became of them is told at the end
            _log.debug("no new aggregator yet: %s", error)

    def _replace_aggregator(self) -> None:
        """Start a new aggregator in the place of one that does not answer."""
        if self._aggregator is not None:
            self._aggregator.kill()
            self._aggregator.wait()

        self._start_aggregator()

    def _end_aggregator(self) -> None:
        """See the aggregator out: it was told to stop, unless something went wrong."""
        if self._aggregator is None:
            return

        if not self._stopping:
            self._aggregator.terminate()

        try:
            self._aggregator.wait(5)
        except subprocess.TimeoutExpired:
            self._aggregator.kill()
            self._aggregator.wait()

    # the job

    def _run_job(self) -> subprocess.Popen[bytes]:
        terminal = PseudoTerminal(sys.stdout.fileno()) if self._make_screen is not None else None
        process = self._start_job(terminal)
        try:
            if self._make_screen is not None:
                self._screen = self._make_screen()
            self._attend(process, terminal)
        finally:
            if process.poll() is None:  # only when something of ours failed: the job does not outlive its supervisor
                process.terminate()
                process.wait()

            if self._screen is not None:
                self._screen.close()

            if terminal is not None:
                terminal.close()

        return process

    def _start_job(self, terminal: PseudoTerminal | None) -> subprocess.Popen[bytes]:
        failures_in, failures_out = os.pipe()
        os.set_blocking(failures_in, False)
        environ = {
            **os.environ,
            **self._job.environ,
            "TRACEML_ADDRESS": f"127.0.0.1:{self._port}",
            "TRACEML_TOKEN": self._token,
            "TRACEML_RUN_ID": self._job.run_id,
            "TRACEML_RUNS_DIR": str(self._job.runs_dir),
            "TRACEML_SUPERVISED": "1",
        }
        if self._job.elastic:
            environ["TRACEML_FAILURES_FD"] = str(failures_out)

        try:
            process = spawn(
                self._job.command,
                environ=environ,
                stdout=terminal.slave if terminal is not None else None,
                stderr=terminal.slave if terminal is not None and sys.stderr.isatty() else None,
                pass_fds=(failures_out,) if self._job.elastic else (),
                death_signal=signal.SIGTERM,
            )
        finally:
            os.close(failures_out)
            if terminal is not None:
                terminal.close_slave()

        self._selector.register(failures_in, selectors.EVENT_READ, "failures")
        return process

    def _attend(self, process: subprocess.Popen[bytes], terminal: PseudoTerminal | None) -> None:
        """Pass output and signals through until the job has ended."""
        ended = os.pidfd_open(process.pid)
        self._selector.register(ended, selectors.EVENT_READ, "ended")
        if terminal is not None:
            self._selector.register(terminal.master, selectors.EVENT_READ, "output")

        try:
            while process.poll() is None:
                ready = {key.data: key for key, _ in self._selector.select(_TICK_S)}
                if "output" in ready and terminal is not None and not self._show(terminal):
                    self._selector.unregister(terminal.master)

                if "failures" in ready:
                    self._read_failures(ready["failures"].fd)

                _pass_signals(process)
                self._keep_aggregator()
                if self._screen is not None:
                    self._screen.tick()

                if terminal is not None:
                    terminal.follow_size()
        finally:
            os.close(ended)

        # last words: what lies in the pipes although their writers are gone
        while terminal is not None and self._show(terminal, at_end=True):
            pass

        for key in list(self._selector.get_map().values()):
            if key.data == "failures":
                self._read_failures(key.fd)

    def _show(self, terminal: PseudoTerminal, *, at_end: bool = False) -> bool:
        """Show what the script wrote; return whether there may be more."""
        data = terminal.read()
        if data and self._screen is not None:
            self._screen.write(data)

        return bool(data) if at_end else data is not None

    def _read_failures(self, fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            lines = os.read(fd, 65536)
            if not lines:
                self._selector.unregister(fd)
                os.close(fd)

            self._failures += [json.loads(line) for line in lines.splitlines()]

    def _status(self, process: subprocess.Popen[bytes]) -> int:
        return status_of(process.wait())

    # the end

    def _finish(self, process: subprocess.Popen[bytes]) -> bool:
        """Tell the aggregator how the processes ended; return whether the run is finished on disk."""
        failures = self._failures
        if not self._job.elastic:
            failures = [{"rank": 0, "local_rank": 0, "pid": process.pid, "exitcode": process.returncode}]

        try:
            if self._aggregator is None or self._aggregator.poll() is not None:
                self._start_aggregator()

            finished = self._tell_end(failures, self._status(process))
            if finished is None:  # it hangs, or died over it: a new one finds what the ranks have left in memory
                self._replace_aggregator()
                finished = self._tell_end(failures, self._status(process))
        except (TraceMLError, OSError) as error:
            _log.debug("the run cannot be finished: %s", error)
            return False

        return bool(finished)

    def _tell_end(self, failures: list[dict[str, Any]], status: int) -> bool | None:
        """Return whether the aggregator has finished the run; None without an answer."""
        hello = Hello(role="client", run=self._job.run_id)
        try:
            connection = connect("127.0.0.1", self._port, hello, self._token, timeout_s=_ANSWER_TIMEOUT_S)
        except (TraceMLError, OSError):
            return None

        with contextlib.closing(connection):
            try:
                connection.request("exits", {"exits": failures}, timeout_s=_FINISH_TIMEOUT_S)
                connection.request("finish", {"status": status}, timeout_s=_FINISH_TIMEOUT_S)
            except OSError:  # a TimeoutError, or the connection broke
                return None
            except TraceMLError as error:
                _log.warning("%s", error)
                return False

            with contextlib.suppress(TraceMLError, OSError):
                connection.request("stop", timeout_s=_ANSWER_TIMEOUT_S)
                self._stopping = True

        return True


def _pass_signals(process: subprocess.Popen[bytes]) -> None:
    """Send the job the signals that came to us alone; those of the terminal it has already."""
    while (info := signal.sigtimedwait(PASSED_ON, 0)) is not None:
        if info.si_code != _SI_KERNEL and process.poll() is None:
            process.send_signal(info.si_signo)
