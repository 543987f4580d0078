"""Start an aggregator for this job on this host, by the first local rank.

Binding the port is the lock: only one process gets it. That process passes the listening socket to the aggregator, so
the other ranks can connect at once, and their handshake waits until the aggregator is up.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from traceml.errors import AggregatorForeignError, AggregatorUnavailableError
from traceml.recorder.detached_process import DetachedProcess
from traceml.settings import Config
from traceml.transport.auth import runtime_folder
from traceml.transport.client import Connection, connect
from traceml.transport.hello import Hello

__all__ = ["connect_or_start"]

_log = logging.getLogger("traceml")

_BACKLOG = 4096
_PROBE_S = 0.25
_TRY_S = 1.0
_ENDING_S = 4.0
_START_S = 20.0  # a cold start on a slow disk; usually it is half a second


class _PortOccupiedError(AggregatorUnavailableError):
    """A program that is no aggregator has the port."""


def connect_or_start(config: Config, hello: Hello, is_ending: Callable[[], bool] = lambda: False) -> Connection:
    """Connect to the running aggregator, or start one and connect to it.

    Where another user's aggregator has the port, this one starts on another port, the same for all ranks of this user.

    Args:
        config: `host`, `port`, `token`, `runs_dir`, `connect_timeout`.
        hello: the rank's.
        is_ending: polled; a process that ends does not wait for an aggregator that another process starts.

    Raises:
        AggregatorUnavailableError: none answers and none could be started; the text says why.
        AggregatorRefusedError: one answers and refuses.
    """
    try:
        try:
            return _connect_or_start(config, hello, is_ending)
        except AggregatorForeignError:
            # This user's aggregator, while it stops, looks like another user's: its token is removed before its
            # connections close. A second try keeps the job's ranks from using two aggregators.
            return _connect_or_start(config, hello, is_ending)
    except (AggregatorForeignError, _PortOccupiedError):
        own = replace(config, port=_own_port(config.port))
        _log.info("port %d belongs to another user: this user's aggregator is at port %d", config.port, own.port)
        return _connect_or_start(own, hello, is_ending)


def _own_port(port: int) -> int:
    """Return the other port for aggregators of this user, below the system's ephemeral ports."""
    return 10_000 + zlib.crc32(f"{os.getuid()}/{port}".encode()) % 20_000


def _connect_or_start(config: Config, hello: Hello, is_ending: Callable[[], bool]) -> Connection:
    began = time.monotonic()
    try:
        return connect(config.host, config.port, hello, config.token, timeout_s=_PROBE_S, tries=1)
    except AggregatorUnavailableError:
        pass

    listener = _claim(config)
    timeout_s = max(config.connect_timeout, _START_S)
    if listener is None:  # another rank is starting it, or another program has the port
        return _await(config, hello, began, timeout_s, is_ending)

    with listener:
        try:
            process, log = _start(config, listener)
        except OSError as error:
            reason = f"none runs there, and none can be started: {error}"
            raise AggregatorUnavailableError(config.host, config.port, time.monotonic() - began, reason) from error

    with contextlib.closing(process):
        return _await_own(config, hello, process, log, began, timeout_s)


def _await_own(
    config: Config, hello: Hello, process: DetachedProcess, log: str, began_s: float, timeout_s: float
) -> Connection:
    """Connect to the aggregator that was started here."""
    while True:
        try:
            return connect(config.host, config.port, hello, config.token, timeout_s=0.5, tries=1)
        except AggregatorUnavailableError as error:
            missing = error

        waited_s = time.monotonic() - began_s
        if process.has_ended():
            raise AggregatorUnavailableError(
                config.host, config.port, waited_s, f"the one started here has ended: {_last_line(Path(log))}"
            ) from missing
        if waited_s > timeout_s:
            raise AggregatorUnavailableError(config.host, config.port, waited_s, missing.reason) from missing


def _await(config: Config, hello: Hello, began_s: float, timeout_s: float, is_ending: Callable[[], bool]) -> Connection:
    """Connect to an aggregator that another rank starts."""
    while True:
        try:
            return connect(config.host, config.port, hello, config.token, timeout_s=_TRY_S, tries=1)
        except AggregatorUnavailableError as error:
            waited_s = time.monotonic() - began_s
            if waited_s > timeout_s:
                raise _PortOccupiedError(config.host, config.port, waited_s, error.reason) from error
            if waited_s > _ENDING_S and is_ending():
                raise

            time.sleep(_PROBE_S)


def _claim(config: Config) -> socket.socket | None:
    """Listen on the aggregator's address; return None when another process does."""
    family, _, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
    try:
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return None

        reason = f"none runs there, and none can be started: {error.strerror}"
        raise AggregatorUnavailableError(config.host, config.port, 0.0, reason) from error


def _start(config: Config, listener: socket.socket) -> tuple[DetachedProcess, str]:
    """Start an aggregator on the socket; return its process and the path of its log."""
    fd = listener.fileno()
    command = [sys.executable, "-m", "traceml", "serve", "--fd", str(fd), "--exit-when-idle"]
    command += ["--runs-dir", str(config.runs_dir.absolute())]
    environ = {key: value for key, value in os.environ.items() if not key.upper().startswith("TRACEML_")}
    if config.token:
        environ["TRACEML_TOKEN"] = config.token
    environ["TRACEML_OUTLIVES"] = "1"  # it outlives a launch's worker, to deliver the worker's rows
    environ["TRACEML_DELIVERY_NICE"] = str(config.delivery_nice)
    if config.keep_runs is not None:
        environ["TRACEML_KEEP_RUNS"] = str(config.keep_runs)
    if config.debug:
        environ["TRACEML_DEBUG"] = "1"

    log = runtime_folder() / f"local-{config.port}.log"
    with log.open("wb") as output:
        process = DetachedProcess(command, output=output, environ=environ, fd=fd)

    _log.info("started an aggregator for this job (pid %d), which logs to %s", process.pid, log)
    return process, str(log)


def _last_line(log: Path) -> str:
    """Return the last line of a log, and the log's path."""
    try:
        lines = log.read_text(errors="replace").split("\n")
    except OSError:
        lines = []

    last = next((line.strip() for line in reversed(lines) if line.strip()), "its log is empty")
    return f"{last[:300]} (log: {log})"
