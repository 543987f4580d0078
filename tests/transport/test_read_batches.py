"""Reads of a server with many connections."""

from __future__ import annotations

import asyncio
import selectors
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from traceml.transport.server import MANY_CONNECTIONS, BatchSelector


@pytest.fixture
def pairs() -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    """As many connections as are read in batches."""
    with ExitStack() as stack:
        made = [socket.socketpair() for _ in range(MANY_CONNECTIONS)]
        for pair in made:
            for each in pair:
                stack.enter_context(each)

        yield made


def test_what_comes_during_the_pause_is_returned_too(pairs):
    """With the first one, in one answer."""
    with BatchSelector(lambda _: pairs[7][1].send(b"x")) as selector:
        for number, (near, _) in enumerate(pairs):
            selector.register(near, selectors.EVENT_READ, number)

        pairs[3][1].send(b"x")

        assert sorted(key.data for key, _ in selector.select()) == [3, 7]


@pytest.mark.parametrize(("count", "timeout"), [(MANY_CONNECTIONS - 1, None), (MANY_CONNECTIONS, 0)])
def test_there_is_no_pause(pairs, count, timeout):
    """For fewer connections, or for a loop that has other work."""
    with BatchSelector(lambda _: pytest.fail("it pauses")) as selector:
        for number, (near, _) in enumerate(pairs[:count]):
            selector.register(near, selectors.EVENT_READ, number)

        pairs[3][1].send(b"x")

        assert [key.data for key, _ in selector.select(timeout)] == [3]


def test_nothing_is_ready_after_the_timeout(pairs):
    """And nothing pauses for it."""
    with BatchSelector() as selector:
        for near, _ in pairs:
            selector.register(near, selectors.EVENT_READ)

        assert selector.select(0.01) == []


def test_a_loop_serves_many_connections(pairs):
    """Each gets what was sent to it."""

    async def echo() -> list[bytes]:
        readers = [await asyncio.open_connection(sock=near) for near, _ in pairs]
        for number, (_, far) in enumerate(pairs):
            far.send(b"%d\n" % number)

        lines = await asyncio.gather(*(reader.readline() for reader, _ in readers))
        for _, writer in readers:
            writer.close()

        return lines

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(BatchSelector())) as runner:
        assert runner.run(echo()) == [b"%d\n" % number for number in range(MANY_CONNECTIONS)]
