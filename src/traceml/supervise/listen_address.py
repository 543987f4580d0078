"""Addresses of servers of ours: as options give them, and listened at."""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Callable
from typing import NamedTuple

from traceml.errors import TraceMLError
from traceml.loopback import is_loopback
from traceml.transport import auth

__all__ = ["ListenAddress", "listen"]

_ADDRESS = re.compile(r"(?:\[?(?P<host>[^\[\]\s]+?)\]?:)?(?P<port>\d{1,5})")


class ListenAddress(NamedTuple):
    """Address of the metrics; the default port is 29767."""

    host: str = "127.0.0.1"
    port: int = 29767

    @classmethod
    def parse(cls, text: str) -> ListenAddress:
        """Return the address in a text: PORT or HOST:PORT.

        Raises:
            ValueError: it is neither; the text says what is allowed.
        """
        match = _ADDRESS.fullmatch(text)
        if match is None or int(match["port"]) > 65535:
            raise ValueError(f"takes PORT or HOST:PORT with a port from 0 to 65535, not {text!r}")

        return cls(match["host"] or cls().host, int(match["port"]))

    @property
    def is_loopback(self) -> bool:
        """Whether only this host reaches it."""
        return is_loopback(self.host)

    def at(self, port: int) -> str:
        """Return the URL of the metrics at a port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{port}/metrics"


def listen(
    host: str, port: int, kind: str, way_out: Callable[[auth.PublishedServer | None], str], backlog: int = 128
) -> socket.socket:
    """Return a socket that listens at an address.

    Args:
        kind: what is to be served there: `auth.AGGREGATOR`, `auth.PAGE` or `auth.METRICS`.
        way_out: returns what can be done instead; it is given this user's server of that kind that has the port.

    Raises:
        TraceMLError: the address cannot be used; the text says by whom it is, and the way out.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=backlog)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            why = f"the {kind} cannot listen on {host}:{port}: {error.strerror or error}"
            raise TraceMLError(f"{why}. {way_out(None)}") from error

        other = auth.discover(port, kind=kind)
        who = f"the {kind} of {other.runs_dir} (pid {other.pid})" if other is not None else "another program"
        raise TraceMLError(f"port {port} on {host} is in use by {who}. {way_out(other)}") from error
