"""The web page beside a job or an aggregator: started, kept alive on the same address, seen out.

The keeper holds the listening socket, so a page that dies is replaced without anybody having to look elsewhere, and
the token stays with the port: browsers that were let in reconnect by themselves, also after the keeper's own restart.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Self
from urllib.parse import quote

from traceml.errors import TraceMLError
from traceml.supervise.output import PassThroughScreen
from traceml.supervise.processes import spawn
from traceml.supervise.restarts import Restarts
from traceml.transport import auth

__all__ = ["DEFAULT_PORT", "PageProcess", "PageScreen", "page_address", "page_beside"]

DEFAULT_PORT = 29766
# Behind the training, but not so far that nobody can look at one that takes every core: at 19 a click takes seconds.
_NICE = 5
_FAREWELL_S = 0.8  # for browsers to be told how the run ended
_STOP_TIMEOUT_S = 5.0

_log = logging.getLogger("traceml")


class PageProcess:
    """Keeps the page of one folder of runs; a context manager, at whose exit it is gone.

    Args:
        runs_dir: the folder.
        port: the port on this host's loopback; 0 takes a free one.
        any_port: take a free port where the wanted one is in use.
        nice: how far the page steps back behind the training.

    Raises:
        TraceMLError: the page's libraries are not installed, or the port is in use.
    """

    def __init__(self, runs_dir: Path, port: int = DEFAULT_PORT, *, any_port: bool = False, nice: int = _NICE) -> None:
        _check_installed()
        self.runs_dir = runs_dir.absolute()
        self._listener = _listen(port, any_port=any_port)
        self._nice = nice
        self.port: int = self._listener.getsockname()[1]
        before = auth.discover(self.port, include_dead=True, kind=auth.PAGE)
        # The socket is ours, so whoever served this port before does so no more.
        self.token = before.token if before is not None else auth.new_token()
        self._process: subprocess.Popen[bytes] | None = None
        self._restarts = Restarts()

    def __enter__(self) -> Self:
        try:
            auth.publish("127.0.0.1", self.port, self.token, runs_dir=str(self.runs_dir), kind=auth.PAGE)
        except OSError as error:
            _log.warning("the page's token cannot be kept; browsers need the printed address again: %s", error)

        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<keeper of the page at port {self.port}>"

    @property
    def pid(self) -> int | None:
        """The page's process; None before it is started and after its end."""
        return None if self._process is None else self._process.pid

    def address(self, run_id: str | None = None) -> str:
        """Return the address that a browser opens, with the token.

        Args:
            run_id: of a run's page; the list of runs without one.
        """
        return page_address(self.port, self.token, run_id)

    def start(self) -> None:
        """Start the page's server on our socket."""
        fd = self._listener.fileno()
        self._restarts.started()
        told, tell = os.pipe()
        try:
            self._process = spawn(
                [sys.executable, "-m", "traceml.display.web", str(fd)],
                environ=os.environ,
                stdin=told,
                stdout=subprocess.DEVNULL,
                pass_fds=(fd,),
                death_signal=signal.SIGTERM,
                own_session=True,
            )
        finally:
            os.close(told)
            with open(tell, "w") as pipe:
                pipe.write(json.dumps({"token": self.token, "runs_dir": str(self.runs_dir), "nice": self._nice}) + "\n")

    def keep(self) -> None:
        """Start the page again if it died. Call it often."""
        if self._process is None or self._process.poll() is None or not self._restarts.due():
            return

        with contextlib.suppress(OSError):  # no memory or no descriptors now; it is tried again
            self.start()

    def close(self) -> None:
        """Tell browsers how things stand, and end the page; may be called again."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGUSR1)
            time.sleep(_FAREWELL_S)
            self._process.terminate()
            try:
                self._process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

        self._process = None
        self._listener.close()


class PageScreen(PassThroughScreen):
    """The page as the screen of a launched job: what the job prints goes to standard output as it comes.

    Args:
        run_dir: the run's folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self._open = ExitStack()
        self._keep = self._open.enter_context(page_beside(run_dir))

    def tick(self) -> None:
        """Start the page again if it died."""
        self._keep()

    def close(self) -> None:
        """End the page."""
        self._open.close()


@contextlib.contextmanager
def page_beside(run_dir: Path) -> Iterator[Callable[[], None]]:
    """Keep a page beside a job, and tell its address on standard error; yields what must be called often.

    A page of this user's that shows the same folder of runs is used as it is.

    Args:
        run_dir: the run's folder, which may not exist yet.

    Raises:
        TraceMLError: the page's libraries are not installed.
    """
    other = auth.discover(DEFAULT_PORT, kind=auth.PAGE)
    if other is not None and Path(other.runs_dir) == run_dir.parent.absolute():
        _tell(page_address(DEFAULT_PORT, other.token, run_dir.name))
        yield lambda: None
        return

    with PageProcess(run_dir.parent, any_port=True) as page:
        _tell(page.address(run_dir.name))
        yield page.keep


def _tell(address: str) -> None:
    sys.stderr.write(f"traceml: the page is at {address}\n")
    sys.stderr.flush()


def page_address(port: int, token: str, run_id: str | None = None) -> str:
    """Return the address of a page on this host, with its token.

    Args:
        port: the page's.
        token: the secret that lets in.
        run_id: of a run's page; the list of runs without one.
    """
    path = "" if run_id is None else f"run/{quote(run_id, safe='')}"
    return f"http://127.0.0.1:{port}/{path}?token={token}"


def _check_installed() -> None:
    if find_spec("nicegui") is None:
        raise TraceMLError("the web page needs NiceGUI, which is not installed: pip install 'traceml[web]'")


def _listen(port: int, *, any_port: bool) -> socket.socket:
    try:
        return socket.create_server(("127.0.0.1", port), backlog=128)
    except OSError as error:
        if any_port:
            return socket.create_server(("127.0.0.1", 0), backlog=128)

        raise TraceMLError(_cannot_listen(port, error)) from error


def _cannot_listen(port: int, error: OSError) -> str:
    if error.errno != errno.EADDRINUSE:
        return f"the page cannot listen on port {port}: {error.strerror or error}. Choose another: --web PORT."

    other = auth.discover(port, kind=auth.PAGE)
    if other is None:
        return f"port {port} is in use by another program. Choose another for the page: --web PORT."

    return (
        f"port {port} is in use by another traceml page (pid {other.pid}, runs in {other.runs_dir}), "
        f"{page_address(port, other.token)}. Use that one, or choose another port: --web PORT."
    )
