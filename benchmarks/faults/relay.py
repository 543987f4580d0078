"""A relay of TCP connections that delays, tears or freezes them."""

from __future__ import annotations

import contextlib
import random
import selectors
import socket
import struct
import threading
import time
from dataclasses import dataclass, field


@dataclass
class _Pair:
    """Both sides of a connection, and bytes that wait for their time: (due, target, data)."""

    sides: tuple[socket.socket, socket.socket]
    waiting: list[tuple[float, socket.socket, bytes]] = field(default_factory=list)
    is_frozen: bool = False

    def other(self, side: socket.socket) -> socket.socket:
        return self.sides[self.sides[0] is side]


class Relay:
    """Passes connections to a port of this host on, from a port of its own, in a thread.

    Attributes:
        port: where it listens.
        delay_s: of all bytes, in each direction.
        torn: connections that were reset in the middle of a message.
    """

    def __init__(self, target_port: int) -> None:
        self._target = ("127.0.0.1", target_port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.delay_s = 0.0
        self.torn = 0
        self._tears = False
        self._pairs: dict[socket.socket, _Pair] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        threading.Thread(target=self._run, name="relay", daemon=True).start()

    def tear_for(self, seconds: float) -> None:
        """Reset each connection after a part of its next message, for so long."""
        self._tears = True
        time.sleep(seconds)
        self._tears = False

    def freeze(self) -> None:
        """Pass nothing more on the connections there are, without closing them; new ones are passed on."""
        for pair in list(self._pairs.values()):
            pair.is_frozen = True

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select(0.01):
                with contextlib.suppress(OSError, KeyError):  # the other side of the same connection has ended
                    self._accept() if key.fileobj is self._listener else self._read(key.fileobj)

            for pair in {id(pair): pair for pair in self._pairs.values()}.values():
                self._flush(pair)

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        far = socket.create_connection(self._target)
        pair = _Pair((near, far))
        for side in pair.sides:
            self._pairs[side] = pair
            self._selector.register(side, selectors.EVENT_READ)

    def _read(self, side: socket.socket) -> None:
        pair = self._pairs[side]
        if pair.is_frozen:
            self._selector.unregister(side)
            return

        try:
            data = side.recv(1 << 16)
        except OSError:
            data = b""

        if data and self._tears and len(data) > 8:
            pair.other(side).sendall(data[: random.randrange(1, len(data))])
            self.torn += 1
            self._reset(pair)
        elif data:
            pair.waiting.append((time.monotonic() + self.delay_s, pair.other(side), data))
        else:
            self._flush(pair, all_of_it=True)
            self._reset(pair, how=b"")

    def _flush(self, pair: _Pair, *, all_of_it: bool = False) -> None:
        while pair.waiting and not pair.is_frozen and (all_of_it or pair.waiting[0][0] <= time.monotonic()):
            _, target, data = pair.waiting.pop(0)
            try:
                target.sendall(data)
            except OSError:
                self._reset(pair, how=b"")
                return

    def _reset(self, pair: _Pair, how: bytes = struct.pack("ii", 1, 0)) -> None:
        for side in pair.sides:
            if self._pairs.pop(side, None) is None:
                continue

            with contextlib.suppress(KeyError):  # frozen: it is not read
                self._selector.unregister(side)

            if how:
                side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, how)  # the other end sees a reset

            side.close()
