"""Handle of the web page process in its parent.

The token stays with the port: browsers reconnect by themselves, also after a restart of the parent.

Process: the command, or the aggregator of `traceml serve`.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Self
from urllib.parse import quote

from traceml.errors import TraceMLError
from traceml.fail_open import print_notice
from traceml.installation import install_command
from traceml.supervise.listen_address import listen
from traceml.supervise.output import PassThroughScreen
from traceml.supervise.processes import spawn_server
from traceml.supervise.restarting_process import RestartingServer
from traceml.transport import auth

__all__ = ["DEFAULT_PORT", "PageProcess", "PageScreen", "check_page_installed", "page_beside"]

DEFAULT_PORT = 29766
# Below the training, but not at 19: where the training uses every core, a click would then take seconds.
_NICE = 5
_FAREWELL_S = 0.8  # for browsers to receive the run's end

_log = logging.getLogger("traceml")


class PageProcess(RestartingServer):
    """The page of one folder of runs. A context manager: its entry starts the page, its exit ends it.

    Args:
        port: the port on this host's loopback; 0 takes a free one.
        any_port: use a free port if the wanted one is in use.

    Raises:
        TraceMLError: the page's libraries are not installed, or the port is in use.
    """

    kind = auth.PAGE

    def __init__(self, runs_dir: Path, port: int = DEFAULT_PORT, *, any_port: bool = False, nice: int = _NICE) -> None:
        check_page_installed()
        super().__init__(runs_dir, _listen(port, any_port=any_port))
        self._nice = nice
        self.token = self.kept_token()

    def __enter__(self) -> Self:
        try:
            auth.publish("127.0.0.1", self.port, self.token, runs_dir=str(self.runs_dir), kind=auth.PAGE)
        except OSError as error:
            _log.warning("the page's token cannot be stored; browsers need the printed address again: %s", error)

        self.start()
        return self

    @property
    def pid(self) -> int | None:
        """The process id; None before the start and after the end."""
        return None if self.process is None else self.process.pid

    def address(self, run_id: str | None = None) -> str:
        """Return the address that a browser opens, with the token.

        Args:
            run_id: the run to show; None: the list of runs.
        """
        return _page_address(self.port, self.token, run_id)

    def spawn_process(self) -> subprocess.Popen[bytes]:
        """Start the page's server on our socket."""
        fd = self.listener.fileno()
        config = {"token": self.token, "runs_dir": str(self.runs_dir), "nice": self._nice}
        return spawn_server("traceml.display.web", config, (fd,), str(fd))

    def close(self) -> None:
        """Send browsers the final state, and end the page. May be called again."""
        if self.process is not None and self.running:
            self.process.send_signal(signal.SIGUSR1)
            time.sleep(_FAREWELL_S)

        super().close()


class PageScreen(PassThroughScreen):
    """The page as the screen of a launched job; the job's output goes to standard output unchanged."""

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
    """Run a page next to a job, and print its address on standard error; yield a function to be called often.

    If this user already runs a page for the same folder of runs, that page is used.

    Args:
        run_dir: the run's folder, which may not exist yet.

    Raises:
        TraceMLError: the page's libraries are not installed.
    """
    other = auth.discover(DEFAULT_PORT, kind=auth.PAGE)
    if other is not None and Path(other.runs_dir) == run_dir.parent.absolute():
        _print_address(_page_address(DEFAULT_PORT, other.token, run_dir.name))
        yield lambda: None
        return

    with PageProcess(run_dir.parent, any_port=True) as page:
        _print_address(page.address(run_dir.name))
        yield page.restart_if_dead


def _print_address(address: str) -> None:
    print_notice(f"traceml: the page is at {address}")


def _page_address(port: int, token: str, run_id: str | None = None) -> str:
    """Return the address of a page on this host, with its token."""
    path = "" if run_id is None else f"run/{quote(run_id, safe='')}"
    return f"http://127.0.0.1:{port}/{path}?token={token}"


def check_page_installed() -> None:
    """Check that the page can be started.

    Raises:
        TraceMLError: its libraries are not installed.
    """
    if find_spec("nicegui") is None:
        raise TraceMLError(f"the web page needs NiceGUI, which is not installed: {install_command('web')}")


def _listen(port: int, *, any_port: bool) -> socket.socket:
    try:
        return listen("127.0.0.1", port, auth.PAGE, _way_out)
    except TraceMLError:
        if any_port:
            return listen("127.0.0.1", 0, auth.PAGE, _way_out)

        raise


def _way_out(other: auth.PublishedServer | None) -> str:
    use = "Choose" if other is None else f"Use that one, {_page_address(other.port, other.token)}, or choose"
    return f"{use} another port: --web PORT."
