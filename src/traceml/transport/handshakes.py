"""Connections that have not proved the token: bounded in number, in time and in bytes, whoever opens them."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Protocol

__all__ = [
    "MAX_HANDSHAKES",
    "MAX_UNAUTHENTICATED_BYTES",
    "TLS_STATE_BYTES",
    "OpenHandshakes",
    "RefusalLog",
    "UnauthenticatedPeer",
]

# Above this many the oldest is cut. Ten thousand ranks that reconnect at once fit.
MAX_HANDSHAKES = 16_384
# Of hellos that have arrived in part, all connections together. A hello is 2 to 6 kB and usually arrives at once.
MAX_UNAUTHENTICATED_BYTES = 16 * 1024 * 1024
# The same with TLS, whose state counts too (measured): 2,700 handshakes at a time.
MAX_UNAUTHENTICATED_TLS_BYTES = 128 * 1024 * 1024
TLS_STATE_BYTES = 48 * 1024

_CONNECTION_BYTES = 10_000
_KEPT_BYTES = 4 * 1024 * 1024  # less need not be given back

_LOGGED_REFUSALS, _LOG_PERIOD_S = 20, 60.0

_log = logging.getLogger("traceml")


class UnauthenticatedPeer(Protocol):
    """A connection in this state."""

    deadline_s: float

    def abort(self) -> None:
        """Cut the connection."""


class OpenHandshakes:
    """Connections before their welcome, and refused ones until they are cut.

    What exceeds a bound is cut, the oldest first: a peer that is only slow may try again, and one that holds bytes on
    purpose has been doing so the longest.
    """

    def __init__(self, *, tls: bool = False) -> None:
        self._limit_bytes = MAX_UNAUTHENTICATED_TLS_BYTES if tls else MAX_UNAUTHENTICATED_BYTES
        self._open: dict[UnauthenticatedPeer, None] = {}
        self._held: dict[UnauthenticatedPeer, int] = {}
        self.held_bytes = 0
        """Bytes of incomplete hellos."""
        self.cut = 0
        """Number of connections cut because of a bound."""
        self._peak_bytes = 0

    def __len__(self) -> int:
        return len(self._open)

    def add(self, peer: UnauthenticatedPeer, time_s: float) -> None:
        """Give a connection this long."""
        self.discard(peer)
        self._open[peer] = None
        peer.deadline_s = time.monotonic() + time_s
        self._record_peak()
        if len(self._open) > MAX_HANDSHAKES:
            self._cut(next(iter(self._open)))

    def hold(self, peer: UnauthenticatedPeer, size: int) -> None:
        """Note how many bytes a connection takes: those of a hello without the rest, and the state of TLS."""
        self.held_bytes += size - self._held.get(peer, 0)
        if size:
            self._held[peer] = size
        else:
            self._held.pop(peer, None)

        self._record_peak()
        while self.held_bytes > self._limit_bytes:
            self._cut(next(iter(self._held)))

    def discard(self, peer: UnauthenticatedPeer) -> None:
        """Forget a connection that was welcomed or closed."""
        self._open.pop(peer, None)
        self.held_bytes -= self._held.pop(peer, 0)

    def overdue(self) -> list[UnauthenticatedPeer]:
        """Return the connections whose time is over."""
        now_s = time.monotonic()
        return [peer for peer in self._open if peer.deadline_s <= now_s]

    def release_memory(self) -> None:
        """Give memory back to the system, once all connections are gone and if they had much."""
        if self._open or self._peak_bytes < _KEPT_BYTES:
            return

        import ctypes

        self._peak_bytes = 0
        with contextlib.suppress(OSError, AttributeError):  # a C library without it
            ctypes.CDLL(None).malloc_trim(0)

    def _record_peak(self) -> None:
        self._peak_bytes = max(self._peak_bytes, self.held_bytes + _CONNECTION_BYTES * len(self._open))

    def _cut(self, peer: UnauthenticatedPeer) -> None:
        self.discard(peer)
        self.cut += 1
        peer.abort()


class RefusalLog:
    """Log of refused peers: each with its reason; of thousands in a minute, and of further tries, only the number."""

    def __init__(self) -> None:
        self._began_s = -_LOG_PERIOD_S
        self._count = 0
        self._logged: set[tuple[str, str]] = set()

    def record(self, who: str, why: str) -> None:
        """Log one refusal.

        Args:
            who: role and host of the peer, without the port, which each try has anew.
        """
        self.flush()
        self._count += 1
        if len(self._logged) < _LOGGED_REFUSALS and (who, why) not in self._logged:
            self._logged.add((who, why))
            _log.warning("refused %s: %s", who, why)

    def flush(self) -> None:
        """Begin a new minute, if it is time, and log how many were left out."""
        now_s = time.monotonic()
        if now_s - self._began_s < _LOG_PERIOD_S:
            return

        if self._count > len(self._logged):
            _log.warning("refused %d more connections in the last minute", self._count - len(self._logged))

        self._began_s, self._count = now_s, 0
        self._logged.clear()
