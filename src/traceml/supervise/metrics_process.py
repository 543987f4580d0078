"""Handle of the process that answers Prometheus, in its parent.

Process: the command, or the aggregator of `traceml serve`.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Self

from traceml.errors import TraceMLError
from traceml.installation import install_command
from traceml.supervise.listen_address import ListenAddress, listen
from traceml.supervise.processes import spawn_server
from traceml.supervise.restarting_process import RestartingServer
from traceml.transport import auth

__all__ = ["MetricsProcess", "metrics_beside"]

_NICE = 5  # as the page: at 19 an answer would take seconds where the training uses every core

_log = logging.getLogger("traceml")


class MetricsProcess(RestartingServer):
    """The metrics of one folder of runs. A context manager: its entry starts the server, its exit ends it.

    Args:
        address: where it listens; port 0 takes a free one.
        secret: the token is derived from this text, so that it stays; None: the token is random.

    Attributes:
        token: the bearer token that requests need; None if only this host reaches the server.

    Raises:
        TraceMLError: `prometheus_client` is not installed, or the port cannot be used.
    """

    kind = auth.METRICS

    def __init__(self, runs_dir: Path, address: ListenAddress, secret: str | None = None) -> None:
        if find_spec("prometheus_client") is None:
            needs = "metrics for Prometheus need prometheus_client, which is not installed"
            raise TraceMLError(f"{needs}: {install_command('prometheus')}")

        choose = "Choose another address: --prometheus HOST:PORT."
        super().__init__(runs_dir, listen(address.host, address.port, self.kind, lambda _: choose))
        self.address = address
        self.token = None if address.is_loopback else self._token(secret)
        self.token_file: Path | None = None

    def __enter__(self) -> Self:
        try:
            host, token = self.address.host, self.token or ""
            auth.publish(host, self.port, token, runs_dir=str(self.runs_dir), kind=auth.METRICS)
            self.token_file = _write_token(self.port, self.token)
        except OSError as error:
            _log.warning("the token of the metrics cannot be stored: %s", error)

        self.start()
        return self

    @property
    def url(self) -> str:
        """The URL of the metrics."""
        return self.address.at(self.port)

    @property
    def announcement(self) -> str:
        """The URL, and the file of the token where requests need one."""
        if self.token is None:
            return self.url

        where = self.token_file or f"no file: it is {self.token}"
        return f"{self.url}, with the bearer token in {where}"

    def spawn_process(self) -> subprocess.Popen[bytes]:
        """Start the server on our socket."""
        fd = self.listener.fileno()
        config = {"fd": fd, "token": self.token, "runs_dir": str(self.runs_dir), "nice": _NICE}
        return spawn_server("traceml.display.monitoring", config, (fd,))

    def close(self) -> None:
        """End the server. May be called again."""
        super().close()
        if self.token_file is not None:
            self.token_file.unlink(missing_ok=True)

    def _token(self, secret: str | None) -> str:
        """Return the token: never the secret itself, which other requests prove and do not send."""
        if secret is not None:
            return hmac.new(secret.encode(), b"traceml metrics", hashlib.sha256).hexdigest()

        return self.kept_token()


@contextlib.contextmanager
def metrics_beside(
    runs_dir: Path, address: ListenAddress | None, secret: str | None, announce: Callable[[str], object]
) -> Iterator[Callable[[], None]]:
    """Serve metrics during the block, if an address is given; yield a function to be called often.

    If this user already serves the metrics of the same folder at this port, that server is used.

    Args:
        address: where to listen; None: nothing is served.
        announce: called with one line that has the address.

    Raises:
        TraceMLError: see `MetricsProcess`.
    """
    if address is None:
        yield lambda: None
        return

    other = auth.discover(address.port, kind=auth.METRICS)
    if other is not None and Path(other.runs_dir) == runs_dir.absolute():
        announce(f"traceml metrics at {address.at(address.port)}, by process {other.pid}")
        yield lambda: None
        return

    with MetricsProcess(runs_dir, address, secret) as process:
        announce(f"traceml metrics at {process.announcement}")
        yield process.restart_if_dead


def _write_token(port: int, token: str | None) -> Path | None:
    """Write the file that Prometheus reads as `credentials_file`."""
    if token is None:
        return None

    path = auth.runtime_folder() / f"{auth.METRICS}-{port}.token"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w") as file:
        file.write(token)

    return path
