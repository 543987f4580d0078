"""Start an aggregator for this job on this host, by the first local rank.

Only one process may start it: the one that gets the lock of the runs folder, or, if an address is given, the one that
binds its port. That process passes the listening socket to the aggregator, so the other ranks can connect at once, and
their handshake waits until the aggregator is up.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path

from traceml.clock import own_time as time
from traceml.errors import AggregatorForeignError, AggregatorUnavailableError, TraceMLError
from traceml.fork_gate import fork_gate
from traceml.helper_programs import helper_program
from traceml.recorder.detached_process import DetachedProcess
from traceml.settings import Config
from traceml.transport.auth import runtime_folder
from traceml.transport.client import START_S, Connection, connect
from traceml.transport.client_handshake import addresses_of
from traceml.transport.folder_aggregator import AggregatorAddress, FolderLock, address_of
from traceml.transport.hello import Hello

__all__ = ["connect_or_start"]

_log = logging.getLogger("traceml")

_BACKLOG = 4096
_PROBE_S = 0.25
_TRY_S = 1.0
_LOCK_POLL_S = 0.05
_REFUSED_POLL_S = 0.5
_ENDING_S = 4.0


# Settings of the job that its aggregator goes by, whatever the files say that it reads, too.
_PASSED_ON = (
    "debug", "delivery_nice", "fleet_dir", "keep_runs", "local_only", "mask", "on_finding", "on_finding_after",
    "otlp_endpoint", "profile_on_finding", "retention", "tls",
)  # fmt: skip


class _PortOccupiedError(AggregatorUnavailableError):
    """The port belongs to a program that is not an aggregator."""


def connect_or_start(config: Config, hello: Hello, is_ending: Callable[[], bool] = lambda: False) -> Connection:
    """Connect to the running aggregator, or start one and connect to it.

    Where an address was given, it is the job's aggregator, whatever its folder; if another user has that port, or none
    was given, it is the runs folder's.

    Args:
        config: `host`, `port`, `token`, `runs_dir`, `connect_timeout`.
        is_ending: polled; a process that ends does not wait for an aggregator that another process starts.

    Raises:
        AggregatorUnavailableError: none answers and none could be started; the text says why.
        AggregatorRefusedError: one answers and refuses.
    """
    try:
        return (_of_address if config.address_given else _of_folder)(config, hello, is_ending)
    except AggregatorUnavailableError as error:
        error.is_local = True
        raise


def _of_address(config: Config, hello: Hello, is_ending: Callable[[], bool]) -> Connection:
    try:
        try:
            return _at_given_address(config, hello, is_ending)
        except AggregatorForeignError:
            # This user's aggregator, while it stops, looks like another user's: its token is removed before its
            # connections close. A second try keeps the job's ranks from using two aggregators.
            return _at_given_address(config, hello, is_ending)
    except (AggregatorForeignError, _PortOccupiedError) as error:
        _log.info("port %d belongs to another user, so the runs folder's aggregator is used: %s", config.port, error)
        return _of_folder(config, hello, is_ending)


class _RefusalTimeout:
    """Time for an aggregator that answers, but refuses, as on a full disk; one that starts has longer."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._refused_s: float | None = None

    def is_over(self, missing: TraceMLError | None) -> bool:
        """Whether it has refused for too long; `missing` is the error of the last try."""
        if not (isinstance(missing, AggregatorUnavailableError) and missing.refused):
            self._refused_s = None
            return False

        now_s = time.monotonic()
        self._refused_s = self._refused_s or now_s
        return now_s - self._refused_s > self._limit_s


def _of_folder(config: Config, hello: Hello, is_ending: Callable[[], bool]) -> Connection:
    """Connect to the aggregator that serves the runs folder, or become the one process that starts it."""
    began_s = time.monotonic()
    timeout_s = max(config.connect_timeout, START_S)
    pause_s = _LOCK_POLL_S
    missing: AggregatorUnavailableError | AggregatorForeignError | None = None
    refusals = _RefusalTimeout(config.connect_timeout)
    while True:
        found = address_of(config.runs_dir, config.port)
        if found is not None:
            try:
                token, tls = config.token or found.token, config.tls or found.tls
                return connect(found.host, found.port, hello, token, timeout_s=_TRY_S, tries=1, tls=tls)
            except AggregatorForeignError as error:
                missing = error  # it stops
            except AggregatorUnavailableError as error:
                missing = error  # it starts, or stops
                if error.refused:  # as on a full disk: no need for haste
                    pause_s = min(2 * pause_s, _REFUSED_POLL_S)
        elif (lock := _acquire_lock(config)) is not None:
            with lock:
                return _start_in_folder(config, hello, lock, began_s, timeout_s)

        waited_s = time.monotonic() - began_s
        if waited_s > timeout_s or refusals.is_over(missing) or (waited_s > _ENDING_S and is_ending()):
            reason = f"another process has the runs folder {config.runs_dir}, and does not answer"
            raise missing or AggregatorUnavailableError(config.host, config.port, waited_s, reason)

        with fork_gate.opened():
            time.sleep(pause_s)


def _acquire_lock(config: Config) -> FolderLock | None:
    try:
        return FolderLock.acquire(config.runs_dir)
    except OSError as error:
        reason = f"none runs there, and none can be started: the runs folder cannot be locked: {error}"
        raise AggregatorUnavailableError(config.host, config.port, 0.0, reason) from error


def _start_in_folder(config: Config, hello: Hello, lock: FolderLock, began_s: float, timeout_s: float) -> Connection:
    """Start the folder's aggregator, on the usual port if that is free; it inherits the lock."""
    listener = _listen(config) or _listen(config.replaced(port=0))
    assert listener is not None, "a free port cannot be in use"
    with listener:
        host, port = listener.getsockname()[:2]
        lock.publish(AggregatorAddress(host, port, tls=config.tls))
        return _start_and_connect(config, hello, listener, began_s, timeout_s, lock)


def _at_given_address(config: Config, hello: Hello, is_ending: Callable[[], bool]) -> Connection:
    began_s = time.monotonic()
    try:
        return connect(config.host, config.port, hello, config.token, timeout_s=_PROBE_S, tries=1, tls=config.tls)
    except AggregatorUnavailableError:
        pass

    listener = _listen(config)
    timeout_s = max(config.connect_timeout, START_S)
    if listener is None:  # another rank is starting it, or another program has the port
        return _await(config, hello, began_s, timeout_s, is_ending)

    with listener:
        return _start_and_connect(config, hello, listener, began_s, timeout_s)


def _start_and_connect(
    config: Config,
    hello: Hello,
    listener: socket.socket,
    began_s: float,
    timeout_s: float,
    lock: FolderLock | None = None,
) -> Connection:
    config = config.replaced(port=listener.getsockname()[1])
    try:
        process, log = _start(config, listener, lock)
    except OSError as error:
        reason = f"none runs there, and none can be started: {error}"
        raise AggregatorUnavailableError(config.host, config.port, time.monotonic() - began_s, reason) from error

    listener.close()  # else a rank would keep connecting to a dead aggregator's port
    if lock is not None:
        lock.close()

    with contextlib.closing(process):
        return _await_own(config, hello, process, log, began_s, timeout_s)


def _await_own(
    config: Config, hello: Hello, process: DetachedProcess, log: str, began_s: float, timeout_s: float
) -> Connection:
    """Connect to the aggregator that was started here."""
    refusals = _RefusalTimeout(config.connect_timeout)
    while True:
        try:
            return connect(config.host, config.port, hello, config.token, timeout_s=0.5, tries=1, tls=config.tls)
        except AggregatorUnavailableError as error:
            missing = error
        except AggregatorForeignError:  # as on a full disk; it is no other user's
            waited_s = time.monotonic() - began_s
            reason = f"it cannot write the file of its token: {_last_line(Path(log))}"
            missing = AggregatorUnavailableError(config.host, config.port, waited_s, reason, refused=True)

        waited_s = time.monotonic() - began_s
        if refusals.is_over(missing):
            raise missing
        if process.has_ended() or waited_s > timeout_s:
            state = "has ended" if process.has_ended() else f"(process {process.pid}) does not answer"
            reason = f"the one started here {state}: {_last_line(Path(log))}"
            raise AggregatorUnavailableError(config.host, config.port, waited_s, reason) from None

        if missing.refused:  # it answered at once
            with fork_gate.opened():
                time.sleep(_PROBE_S)


def _await(config: Config, hello: Hello, began_s: float, timeout_s: float, is_ending: Callable[[], bool]) -> Connection:
    """Connect to an aggregator that another rank starts."""
    refusals = _RefusalTimeout(config.connect_timeout)
    while True:
        try:
            return connect(config.host, config.port, hello, config.token, timeout_s=_TRY_S, tries=1, tls=config.tls)
        except AggregatorUnavailableError as error:
            waited_s = time.monotonic() - began_s
            if waited_s > timeout_s:
                raise _PortOccupiedError(config.host, config.port, waited_s, error.reason) from error
            if refusals.is_over(error) or (waited_s > _ENDING_S and is_ending()):
                raise

            with fork_gate.opened():
                time.sleep(_PROBE_S)


def _listen(config: Config) -> socket.socket | None:
    """Listen on the aggregator's address; return None when another process does."""
    try:
        family, _, _, _, address = addresses_of(config.host, config.port)[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return None

        reason = f"none runs there, and none can be started: {error.strerror}"
        raise AggregatorUnavailableError(config.host, config.port, 0.0, reason) from error


def _start(config: Config, listener: socket.socket, lock: FolderLock | None) -> tuple[DetachedProcess, str]:
    """Start an aggregator on the socket; return its process and the path of its log."""
    fds = [listener.fileno()]
    command = helper_program("traceml", "serve", "--fd", str(listener.fileno()), "--exit-when-idle")
    command += ["--runs-dir", str(config.runs_dir)]
    if lock is not None:
        fds.append(lock.fileno())
        command += ["--folder-fd", str(lock.fileno())]

    environ = {key: value for key, value in os.environ.items() if not key.upper().startswith("TRACEML_")}
    if config.token:
        environ["TRACEML_TOKEN"] = config.token
    environ["TRACEML_OUTLIVES"] = "1"  # it outlives a launch's worker, to deliver the worker's rows
    environ |= {f"TRACEML_{name.upper()}": _as_variable(getattr(config, name)) for name in _PASSED_ON}

    log = runtime_folder() / f"local-{config.port}.log"
    with log.open("wb") as output:
        process = DetachedProcess(command, output=output, environ=environ, fds=fds)

    _log.info("started an aggregator for this job (pid %d), which logs to %s", process.pid, log)
    return process, str(log)


def _as_variable(value: object) -> str:
    """Return a setting as text for the environment; "none" for None, as an empty variable counts as unset."""
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return json.dumps(value)

    return str(value.absolute() if isinstance(value, Path) else value)


def _last_line(log: Path) -> str:
    """Return the last line of a log, and the log's path."""
    try:
        lines = log.read_text(errors="replace").split("\n")
    except OSError:
        lines = []

    empty = "its log is empty" if _has_space(log.parent) else f"the disk of {log.parent} is full"
    last = next((line.strip() for line in reversed(lines) if line.strip()), empty)
    return f"{last[:300]} (log: {log})"


def _has_space(folder: Path) -> bool:
    try:
        return os.statvfs(folder).f_bavail > 0
    except OSError:
        return True
