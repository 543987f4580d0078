"""Nodes whose ranks send their rows to the aggregator of another one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from traceml.aggregator import joined_nodes
from traceml.aggregator.joined_nodes import JoinedNodes

NODE = {"host": "node2", "pid": 7}


def test_the_end_waits_for_nodes_that_have_joined() -> None:
    """They report the ends of their ranks last."""
    nodes, left = JoinedNodes(), []
    nodes.join("a-run", NODE)

    async def end() -> None:
        waiting = asyncio.create_task(nodes.left("a-run"))
        await nodes.left("another-run")  # of which no node is a part
        assert not waiting.done()
        nodes.leave("a-run", {**NODE, "ended_by": None})
        await waiting
        left.append(True)

    asyncio.run(end())

    assert left == [True]


def test_a_node_that_died_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """It never leaves."""
    monkeypatch.setattr(joined_nodes, "_POLLS", 3)
    nodes = JoinedNodes()
    nodes.join("a-run", NODE)

    asyncio.run(asyncio.wait_for(nodes.left("a-run"), 60))


@pytest.mark.parametrize("member", [{}, {"host": "node2"}, {"host": 1, "pid": 7}, {"host": "node2", "pid": "7"}])
def test_what_names_no_node_is_ignored(member: dict[str, object]) -> None:
    """Nothing is waited for, and nothing that is missing is removed."""
    nodes = JoinedNodes()
    nodes.join("a-run", member)
    nodes.leave("a-run", member)

    asyncio.run(nodes.left("a-run"))


def test_a_damaged_archive_is_an_error(tmp_path: Path) -> None:
    """Its parts are not kept: the next one begins anew."""
    nodes = JoinedNodes()

    async def send(data: bytes, *, last: bool) -> Path | None:
        return await nodes.take_archive(tmp_path, {"name": "../node2-1", "data": data, "last": last})

    assert asyncio.run(send(b"not an", last=False)) is None
    for _ in range(2):
        with pytest.raises(ValueError, match=r"\.\._node2-1 was damaged in transit"):
            asyncio.run(send(b" archive", last=True))


def test_an_archive_that_was_interrupted_is_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of the first try are no part of the second; one that follows on none is refused."""
    taken = []
    monkeypatch.setattr(joined_nodes, "unpack_flight", lambda data, folder, label: taken.append(data))
    nodes = JoinedNodes()

    async def send(data: bytes, offset: int) -> None:
        await nodes.take_archive(tmp_path, {"name": "node2-1", "data": data, "offset": offset, "last": offset > 0})

    asyncio.run(send(b"first ", 0))  # and the connection breaks
    asyncio.run(send(b"first ", 0))
    asyncio.run(send(b"second", 6))
    with pytest.raises(ValueError, match="a part of the files of node2-1 is missing"):
        asyncio.run(send(b"second", 6))  # another aggregator had the first part

    assert taken == [b"first second"]


def test_an_archive_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The aggregator holds it in memory."""
    monkeypatch.setattr(joined_nodes, "ARCHIVE_LIMIT_BYTES", 10 << 20)
    nodes = JoinedNodes()
    part = {"name": "node2-1", "data": bytes(4 << 20), "last": False}

    async def send() -> None:
        for _ in range(3):
            await nodes.take_archive(tmp_path, part)

    with pytest.raises(ValueError, match="more than 10 MiB of one rank"):
        asyncio.run(send())
