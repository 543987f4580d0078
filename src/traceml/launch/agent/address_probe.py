"""Check that this host can connect to the address where the ranks meet."""

from __future__ import annotations

import errno
import os
import selectors
import socket
import time
from collections.abc import Callable

__all__ = ["AddressProbe"]

_LIMIT_S = 10.0  # the first packets may be lost: TCP repeats them after 1, 3 and 7 s


class AddressProbe:
    """One attempt to connect, which nobody waits for.

    Args:
        selector: the agent's; what is registered there has a callable as data, which takes the events.
        on_done: called with why it cannot be reached; empty if it can.
    """

    def __init__(
        self, selector: selectors.BaseSelector, address: str, port: int, on_done: Callable[[str], None]
    ) -> None:
        self._selector, self._on_done = selector, on_done
        self._began_s = time.monotonic()
        family, _, _, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        error = self._socket.connect_ex(target)
        if error in (0, errno.EINPROGRESS):
            selector.register(self._socket, selectors.EVENT_WRITE, lambda _: self._connected())
        else:
            self._finish(error)

    def tick(self) -> None:
        """Give up after the time limit."""
        if self._socket.fileno() >= 0 and time.monotonic() - self._began_s > _LIMIT_S:
            self._selector.unregister(self._socket)
            self._finish(errno.ETIMEDOUT)

    def _connected(self) -> None:
        self._selector.unregister(self._socket)
        self._finish(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    def _finish(self, error: int) -> None:
        self._socket.close()
        self._on_done(os.strerror(error) if error else "")
