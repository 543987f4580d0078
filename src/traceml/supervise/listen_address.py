"""Address of a server of ours, as options give it."""

from __future__ import annotations

import re
from typing import NamedTuple

from traceml.loopback import is_loopback

__all__ = ["ListenAddress"]

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
