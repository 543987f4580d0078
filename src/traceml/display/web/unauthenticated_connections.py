"""Connections to the page that have not shown its cookie: bounded in number and in time, whoever opens them.

Every user of the host can connect to the page's port. Without a bound the descriptors of the page would run out, and
with them its access to the stores of the runs.
"""

from __future__ import annotations

import asyncio
import resource

from uvicorn.protocols.http.auto import AutoHTTPProtocol

__all__ = ["MAX_UNAUTHENTICATED", "UnauthenticatedConnections"]

MAX_UNAUTHENTICATED = 256
"""Above this many the oldest is cut; of a small descriptor limit a quarter."""
# A browser sends its cookie with the first request; one that has none has its answer by then, and asks again.
_LIMIT_S = 20.0

Address = tuple[str, int]


class UnauthenticatedConnections:
    """The connections before their first request with the cookie, by the address of the client."""

    def __init__(self, most: int = MAX_UNAUTHENTICATED) -> None:
        self._most = min(most, max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4, 1))
        self._open: dict[Address, tuple[asyncio.Transport, asyncio.TimerHandle]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def add(self, client: Address, transport: asyncio.Transport) -> None:
        """Begin the time of a new connection; of too many the oldest is cut."""
        self.discard(client)  # a port of the client that is used again
        self._open[client] = transport, asyncio.get_running_loop().call_later(_LIMIT_S, self._cut, client)
        if len(self._open) > self._most:
            self._cut(next(iter(self._open)))

    def discard(self, client: Address | None) -> None:
        """Forget a connection that has shown the cookie, or was closed."""
        if client is not None and (known := self._open.pop((client[0], client[1]), None)) is not None:
            known[1].cancel()

    def protocol(self) -> type[asyncio.Protocol]:
        """Return the class of connections for uvicorn that are counted here."""
        counted = self

        class CountedConnection(AutoHTTPProtocol):  # type: ignore[misc]  # types are checked without it
            def connection_made(self, transport: asyncio.Transport) -> None:
                super().connection_made(transport)
                if self.client is not None:
                    counted.add(self.client, transport)

            def connection_lost(self, exc: Exception | None) -> None:
                super().connection_lost(exc)
                counted.discard(self.client)

        return CountedConnection

    def _cut(self, client: Address) -> None:
        transport = self._open[client][0]
        self.discard(client)
        transport.abort()
