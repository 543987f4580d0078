"""What is looked at is read once for all browsers, in a thread of its own, and no faster than its share of a core."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Hashable
from functools import partial
from typing import Generic, Protocol, TypeVar

__all__ = ["PollSource", "PollerRegistry", "SharedPoller"]

# A reload of the page, or a look at the list and back, must not read a run anew.
_LINGER_S = 20.0
_SHARE = 0.04  # of a core, over all that is read again; the training needs the rest
_LONGEST_S = 10.0

_log = logging.getLogger("traceml")

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")


class PollSource(Protocol[T_co]):
    """Something that can be read again and again, from one thread."""

    def read(self) -> T_co | None:
        """Return how it stands now; None when nothing has changed since the last call."""

    def close(self) -> None:
        """Let go of what is open."""


class SharedPoller(Generic[T]):
    """Reads a source while somebody looks, and hands each state to all who do; used from the event loop.

    Args:
        source: what is read, in the feed's thread alone.
        interval_s: least time between two reads; more where reading takes long.
        on_idle: called in the event loop when nobody has looked for a while and the thread has ended.
    """

    def __init__(self, source: PollSource[T], *, interval_s: float, on_idle: Callable[[], None]) -> None:
        self.latest: T | None = None
        self._source = source
        self._interval_s = interval_s
        self._on_idle = on_idle
        self.listeners: set[Callable[[T], object]] = set()
        self._left_s = time.monotonic()
        self._wake = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._thread: threading.Thread | None = None

    def subscribe(self, listener: Callable[[T], object]) -> None:
        """Call `listener` in the event loop with each new state, and at once with the last one, if there is one."""
        self.listeners.add(listener)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="traceml-feed", daemon=True)
            self._thread.start()

        if self.latest is not None:
            listener(self.latest)

    def unsubscribe(self, listener: Callable[[T], object]) -> None:
        """Call it no more."""
        self.listeners.discard(listener)
        self._left_s = time.monotonic()

    def hurry(self) -> None:
        """Read again now."""
        self._wake.set()

    def _run(self) -> None:
        try:
            while self.listeners or time.monotonic() - self._left_s < _LINGER_S:
                began_s = time.thread_time()
                self._read()
                spent_s = time.thread_time() - began_s
                self._wake.wait(min(max(self._interval_s, spent_s / _SHARE), _LONGEST_S))
                self._wake.clear()
        finally:
            self._source.close()
            self._call(self._on_idle)

    def _read(self) -> None:
        try:
            state = self._source.read()
        except Exception:  # noqa: BLE001 - one bad read must not end the page for all; the next one may do
            _log.exception("the page could not read %r", self._source)
            return

        if state is not None:
            self._call(self._publish, state)

    def _publish(self, state: T) -> None:
        self.latest = state
        for listener in tuple(self.listeners):
            listener(state)

    def _call(self, function: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            pass  # the loop is closed: the page is ending


class PollerRegistry(Generic[T]):
    """The feeds that are looked at, by key; used from the event loop.

    Args:
        open_source: makes the source of a key.
        interval_s: least time between two reads of each.
    """

    def __init__(self, open_source: Callable[[Hashable], PollSource[T]], *, interval_s: float = 1.0) -> None:
        self._open = open_source
        self._interval_s = interval_s
        self._feeds: dict[Hashable, SharedPoller[T]] = {}

    def subscribe(self, key: Hashable, listener: Callable[[T], object]) -> None:
        """Call `listener` in the event loop with each new state of a key, and at once with the last one."""
        if key not in self._feeds:
            self._feeds[key] = SharedPoller(
                self._open(key), interval_s=self._interval_s, on_idle=partial(self._forget, key)
            )

        self._feeds[key].subscribe(listener)

    def unsubscribe(self, key: Hashable, listener: Callable[[T], object]) -> None:
        """Call it no more."""
        if key in self._feeds:
            self._feeds[key].unsubscribe(listener)

    def hurry(self) -> None:
        """Read all again now."""
        for feed in self._feeds.values():
            feed.hurry()

    def _forget(self, key: Hashable) -> None:
        """Drop a feed whose thread has ended; who came in that moment gets a new one."""
        for listener in self._feeds.pop(key).listeners:
            self.subscribe(key, listener)
