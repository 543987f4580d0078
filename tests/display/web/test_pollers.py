"""One thread per source for all listeners."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Hashable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from traceml.display.web import pages, pollers
from traceml.display.web.pages import Pages
from traceml.display.web.pollers import PollerRegistry


class Counting:
    """Counts its reads; every third one fails, and the second has nothing new."""

    def __init__(self) -> None:
        self.reads = 0
        self.closed = threading.Event()
        self.threads: set[int] = set()

    def read(self) -> int | None:
        self.reads += 1
        self.threads.add(threading.get_ident())
        if self.reads % 3 == 0:
            raise OSError("the disk is away")

        return None if self.reads == 2 else self.reads

    def close(self) -> None:
        self.closed.set()


async def until(what: Callable[[], object]) -> None:
    """Wait until it is true."""
    async with asyncio.timeout(120):
        while not what():  # noqa: ASYNC110 - what is waited for happens in other threads
            await asyncio.sleep(0.005)


@pytest.fixture
def sources() -> dict[Hashable, list[Counting]]:
    """The sources that were opened, by key."""
    return {}


@pytest.fixture
def feeds(sources: dict[Hashable, list[Counting]]) -> PollerRegistry[int]:
    """Pollers that read without pause."""

    def open_source(key: Hashable) -> Counting:
        sources.setdefault(key, []).append(Counting())
        return sources[key][-1]

    return PollerRegistry(open_source, interval_s=0.001)


def test_all_who_look_share_one_reader(feeds, sources, monkeypatch):
    """A later listener gets the latest state at once; a failed or empty read is skipped."""
    monkeypatch.setattr(pollers, "_LINGER_S", 0.0)
    first: list[int] = []
    second: list[int] = []

    async def look() -> None:
        feeds.subscribe("a", first.append)
        await until(lambda: len(first) >= 4)
        feeds.subscribe("a", second.append)
        assert second[:1] == first[-1:]
        await until(lambda: len(second) >= 3)
        feeds.unsubscribe("a", first.append)
        feeds.unsubscribe("a", second.append)
        await until(sources["a"][0].closed.is_set)

    asyncio.run(look())
    assert first[:3] == [1, 4, 5]
    assert len(sources["a"]) == 1
    assert len(sources["a"][0].threads) == 1
    assert threading.get_ident() not in sources["a"][0].threads


def test_nobody_looking_ends_the_thread_and_the_next_one_reads_anew(feeds, sources, monkeypatch):
    monkeypatch.setattr(pollers, "_LINGER_S", 0.0)
    seen: list[int] = []

    async def look() -> None:
        feeds.subscribe("a", seen.append)
        await until(lambda: seen)
        feeds.unsubscribe("a", seen.append)
        await until(sources["a"][0].closed.is_set)
        seen.clear()
        feeds.subscribe("a", seen.append)
        await until(lambda: 1 in seen)
        feeds.unsubscribe("a", seen.append)
        await until(sources["a"][-1].closed.is_set)

    asyncio.run(look())


def test_a_page_waits_for_its_first_state(feeds, sources, monkeypatch, tmp_path: Path) -> None:
    """So that it is there at the first paint."""
    monkeypatch.setattr(pages, "_FIRST_S", 60.0)
    monkeypatch.setattr(pollers, "_LINGER_S", 0.0)
    shown: list[int] = []
    leave: list[Callable[[], None]] = []
    client: Any = SimpleNamespace(on_delete=leave.append)

    async def look() -> None:
        await Pages(tmp_path)._follow(client, feeds, "a", shown.append)
        assert shown
        leave[0]()
        await until(sources["a"][0].closed.is_set)

    asyncio.run(look())


def test_each_key_has_its_own(feeds, sources, monkeypatch):
    monkeypatch.setattr(pollers, "_LINGER_S", 0.0)
    seen: dict[str, list[int]] = {"a": [], "b": []}

    async def look() -> None:
        for key, states in seen.items():
            feeds.subscribe(key, states.append)

        await until(lambda: all(seen.values()))
        feeds.refresh()
        for key, states in seen.items():
            feeds.unsubscribe(key, states.append)

        await until(lambda: all(made[0].closed.is_set() for made in sources.values()))

    asyncio.run(look())
    assert set(sources) == {"a", "b"}
