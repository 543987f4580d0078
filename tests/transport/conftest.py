"""A server in a thread of its own, on a free port, with a handler that remembers."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from traceml.transport import server as server_module
from traceml.transport.client import Connection
from traceml.transport.framing import encode
from traceml.transport.hello import Hello
from traceml.transport.server import Peer, RefusedError, Server

TOKEN = "right"


class Remembering:
    """A handler that acknowledges rows at once and keeps everything else."""

    def __init__(self) -> None:
        self.rows_taken: list[tuple[str, int, int]] = []
        self.messages: list[dict[str, Any]] = []
        self.gone_ranks: list[int] = []
        self.refuse: RefusedError | None = None

    def welcome(self, peer: Peer) -> dict[str, Any]:
        if self.refuse is not None:
            raise self.refuse

        return {"acked": {"steps": 7}, "run_id": "the-run", "run_dir": "/runs/the-run", "stream": 3}

    def rows(self, peer: Peer, message: dict[str, Any]) -> None:
        if message["table"] == "broken":
            raise ZeroDivisionError("a mistake of ours")

        self.rows_taken.append((message["table"], message["seq"], message["n"]))
        peer.send({"t": "ack", "table": message["table"], "seq": message["seq"] + message["n"]})

    def message(self, peer: Peer, message: dict[str, Any]) -> None:
        self.messages.append(message)
        if message["t"] == "command":
            before, after = ({"t": "command", "id": 99, "name": name, "args": {}} for name in ("before", "after"))
            reply = {"t": "reply", "id": message["id"], **message["args"]}
            peer.write(b"".join(map(encode, (before, reply, after))))
        elif message["t"] == "bye":
            peer.send({"t": "bye"})
            peer.close()

    def disconnected(self, peer: Peer) -> None:
        assert peer.hello is not None
        self.gone_ranks.append(peer.hello.rank)


class Serving:
    """A server that runs from `start` until the test ends; before, its port is taken without an answer."""

    def __init__(self) -> None:
        self.handler = Remembering()
        self.sock = socket.socket()
        self.sock.bind(("127.0.0.1", 0))
        self.port: int = self.sock.getsockname()[1]
        self.server: Server
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> Serving:
        self._thread.start()
        assert self._ready.wait(240)
        return self

    def connect(self, rank: int = 0, *, token: str = TOKEN, **facts: Any) -> Connection:
        hello = Hello(role="rank", run="job", rank=rank, world_size=64, **facts)
        return Connection.connect("127.0.0.1", self.port, hello, token, timeout_s=60)

    def raw(self) -> socket.socket:
        """Connect without a word."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(240)
        self._loop.close()

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        self.server = Server(self.handler, TOKEN)
        self._stop = asyncio.Event()
        await self.server.start(self.sock)
        self._ready.set()
        await self._stop.wait()
        await self.server.stop()


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    monkeypatch.setattr(server_module, "HANDSHAKE_S", 120.0)  # on a busy machine a hello takes long
    running = Serving().start()
    yield running
    running.close()
