"""An aggregator for this job on this host, started by whichever local rank comes first.

Binding the port is the lock: the kernel gives it to one process. The winner hands the listening socket to the
aggregator, so the others can connect from then on, and their handshake waits until it is up.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from traceml.errors import AggregatorForeignError, AggregatorUnavailableError
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


class _OccupiedError(AggregatorUnavailableError):
    """Something that is no aggregator has the port."""


class _Detached(subprocess.Popen[bytes]):
    """A process that outlives this one on purpose: it ends by itself, after the last rank has left."""

    def __del__(self) -> None:
        """Leave it alone, and do not warn of that."""


def connect_or_start(config: Config, hello: Hello, is_ending: Callable[[], bool] = lambda: False) -> Connection:
    """Connect to the aggregator that is there, or start one and connect to that.

    Where somebody else's has the port, one is started on another, the same for all ranks of this user.

    Args:
        config: `host`, `port`, `token`, `runs_dir`, `connect_timeout`.
        hello: who connects.
        is_ending: asked now and then; a process that ends waits for nobody else's aggregator to come up.

    Raises:
        AggregatorUnavailableError: none is there and none could be started; the text says why.
        AggregatorRefusedError: one is there and refused.
    """
    try:
        try:
            return _connect_or_start(config, hello, is_ending)
        except AggregatorForeignError:
            # Our own that was just ending looks like somebody else's: its token is gone before its connections are.
            # Were the job's ranks to take it for one and for the other, they would end at two aggregators.
            return _connect_or_start(config, hello, is_ending)
    except (AggregatorForeignError, _OccupiedError):
        own = replace(config, port=_own_port(config.port))
        _log.info("somebody else has port %d: this user's aggregator is at %d", config.port, own.port)
        return _connect_or_start(own, hello, is_ending)


def _own_port(port: int) -> int:
    """Return another port for the aggregators of this user, below those that the system gives out."""
    return 10_000 + zlib.crc32(f"{os.getuid()}/{port}".encode()) % 20_000


def _connect_or_start(config: Config, hello: Hello, is_ending: Callable[[], bool]) -> Connection:
    began = time.monotonic()
    try:
        return connect(config.host, config.port, hello, config.token, timeout_s=_PROBE_S, tries=1)
    except AggregatorUnavailableError as error:
        missing = error

    listener = _claim(config)
    timeout_s = max(config.connect_timeout, _START_S)
    if listener is None:  # another rank starts it just now, or something that is no aggregator has the port
        return _await(config, hello, began, timeout_s, is_ending)

    with listener:
        try:
            process, log = _start(config, listener)
        except OSError as error:
            reason = f"none runs there, and none can be started: {error}"
            raise AggregatorUnavailableError(config.host, config.port, time.monotonic() - began, reason) from error

    while True:
        try:
            return connect(config.host, config.port, hello, config.token, timeout_s=0.5, tries=1)
        except AggregatorUnavailableError as error:
            missing = error

        waited_s = time.monotonic() - began
        if process.poll() is not None:
            raise AggregatorUnavailableError(
                config.host,
                config.port,
                waited_s,
                f"the one started here ended with {process.returncode}: {_last_words(Path(log))}",
            ) from missing
        if waited_s > timeout_s:
            raise AggregatorUnavailableError(config.host, config.port, waited_s, missing.reason) from missing


def _await(config: Config, hello: Hello, began_s: float, timeout_s: float, is_ending: Callable[[], bool]) -> Connection:
    """Connect to an aggregator that somebody else starts."""
    while True:
        try:
            return connect(config.host, config.port, hello, config.token, timeout_s=_TRY_S, tries=1)
        except AggregatorUnavailableError as error:
            waited_s = time.monotonic() - began_s
            if waited_s > timeout_s:
                raise _OccupiedError(config.host, config.port, waited_s, error.reason) from error
            if waited_s > _ENDING_S and is_ending():
                raise

            time.sleep(_PROBE_S)


def _claim(config: Config) -> socket.socket | None:
    """Listen on the aggregator's address, or return None when somebody else does."""
    family, _, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
    try:
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return None

        reason = f"none runs there, and none can be started: {error.strerror}"
        raise AggregatorUnavailableError(config.host, config.port, 0.0, reason) from error


def _start(config: Config, listener: socket.socket) -> tuple[_Detached, str]:
    """Start an aggregator on the socket; return its process and where it logs."""
    fd = listener.fileno()
    command = [sys.executable, "-m", "traceml", "serve", "--fd", str(fd), "--exit-when-idle"]
    command += ["--runs-dir", str(config.runs_dir.absolute())]
    environ = {key: value for key, value in os.environ.items() if not key.upper().startswith("TRACEML_")}
    if config.token:
        environ["TRACEML_TOKEN"] = config.token
    environ["TRACEML_OUTLIVES"] = "1"  # started by a launch's worker, it has yet to deliver what that has logged
    environ["TRACEML_DELIVERY_NICE"] = str(config.delivery_nice)
    if config.keep_runs is not None:
        environ["TRACEML_KEEP_RUNS"] = str(config.keep_runs)
    if config.debug:
        environ["TRACEML_DEBUG"] = "1"

    log = runtime_folder() / f"local-{config.port}.log"
    with log.open("wb") as output:
        process = _Detached(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environ,
            pass_fds=(fd,),
            start_new_session=True,  # Ctrl-C at the terminal is for the job; the aggregator has to see its end
            cwd=Path.cwd(),
        )

    _log.info("started an aggregator for this job (pid %d), which logs to %s", process.pid, log)
    return process, str(log)


def _last_words(log: Path) -> str:
    """Return the last line of a log, and where the rest is."""
    try:
        lines = log.read_text(errors="replace").split("\n")
    except OSError:
        lines = []

    said = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    return f"{said[:300]} (log: {log})"
