"""Both sides of a connection: an aggregator whose peer sends anything, and a client whose server does."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.generated.targets import DAMAGE, PACKABLE, Damage, Target
from traceml.aggregator.aggregator import Aggregator
from traceml.errors import AggregatorRefusedError, ProtocolError
from traceml.transport import auth
from traceml.transport.client_handshake import ClientHandshake
from traceml.transport.framing import WIRE_VERSION, Decoder, encode
from traceml.transport.hello import Hello
from traceml.transport.server import Peer

__all__ = ["TARGETS"]

_TOKEN = "of-generated-peers"
_TIMEOUT_S = 30.0


def _hello(challenge: dict[str, Any], role: Any) -> bytes:
    hello = Hello(role=role, run="job", rank=0, world_size=1, command="train.py")
    proof = auth.mac(_TOKEN, challenge["nonce"], hello.role, hello.run, hello.rank)
    return encode(hello.to_message(WIRE_VERSION, auth.client_nonce(), proof))


async def _talk(folder: Path, role: str | None, damage: Damage | None, messages: list[dict[str, Any]]) -> None:
    """Connect, greet, send messages, and wait until the aggregator has closed the connection."""
    aggregator = Aggregator(folder / "runs", _TOKEN, delivery_nice=0)
    near, far = socket.socketpair()
    await asyncio.get_running_loop().create_connection(lambda: Peer(aggregator.server), sock=near)
    reader, writer = await asyncio.open_connection(sock=far)
    (challenge,) = Decoder().feed(await reader.read(65536))
    sent = _hello(challenge, role or "rank") + b"".join(map(encode, messages))
    writer.write(sent if damage is None else damage.of(sent))
    writer.write_eof()
    async with asyncio.timeout(_TIMEOUT_S):
        answered = await reader.read()

    writer.close()
    assert all(type(answer["t"]) is str for answer in Decoder().feed(answered))
    assert aggregator.server.statistics().handler_errors == 0
    for run in list(aggregator.registry.open_runs):
        assert await aggregator.end(run)


def _aggregator(value: tuple[str, Damage | None, list[dict[str, Any]]], folder: Path) -> None:
    """Whatever a peer sends, only its own connection ends, with a reason; the run can be closed."""
    role, damage, messages = value
    asyncio.run(_talk(folder, role, damage, messages))


def _client(value: tuple[Damage, list[dict[str, Any]]], _folder: Path) -> None:
    """A client leaves a server that sends anything with an error of its own."""
    damage, messages = value
    near, far = socket.socketpair()
    challenge = {"t": "challenge", "v": WIRE_VERSION, "nonce": auth.server_nonce()}
    sent = damage.of(b"".join(map(encode, [challenge, *messages])))

    def answer() -> None:
        with far:
            far.sendall(sent)
            far.shutdown(socket.SHUT_WR)
            while far.recv(65536):
                pass

    thread = threading.Thread(target=answer)
    thread.start()
    refused: Exception | None = None
    try:
        with near:
            hello = Hello(role="rank", run="job", rank=0, world_size=1)
            ClientHandshake(near, "127.0.0.1", 1, time.monotonic() + _TIMEOUT_S, None).run(hello, _TOKEN)
    except (AggregatorRefusedError, ProtocolError, OSError) as error:
        refused = error
    finally:
        thread.join()

    assert refused is not None, "a server that does not know the token was believed"
    assert not isinstance(refused, TimeoutError)


_KINDS = st.sampled_from(
    ["hello", "rows", "command", "reply", "bye", "clock", "ping", "refused", "welcome", "challenge", "x"]
)
_FIELDS = st.sampled_from(
    ["id", "name", "args", "reason", "failures", "offset_ns", "rtt_ns", "pair", "ns", "why", "table", "seq", "n",
     "data", "v", "nonce", "mac", "result", "retry"]
)  # fmt: skip
_NAMES = st.sampled_from(["status", "exits", "deliveries", "trackers"])


@st.composite
def _messages(draw: st.DrawFn) -> list[dict[str, Any]]:
    found = []
    for _ in range(draw(st.integers(0, 4))):
        message = draw(st.dictionaries(_FIELDS, PACKABLE, max_size=4))
        kind = draw(_KINDS)
        # `finish` and questions to ranks wait for what never comes; what they are given is still any value.
        named = {"name": draw(_NAMES)}
        found.append({**message, **(named if kind == "command" else {}), "t": kind})

    return found


TARGETS = (
    Target(
        "peer of an aggregator",
        st.tuples(st.sampled_from(["rank", "client"]), st.one_of(st.none(), st.none(), DAMAGE), _messages()),
        _aggregator,
        20,
    ),
    Target("server of a client", st.tuples(DAMAGE, _messages()), _client, 30),
)
